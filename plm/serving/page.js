// The page of plm serve. It does what any client can do, by the endpoints of the server. Texts and ids become text nodes.
"use strict";

const settings = document.body.dataset;
const numQuestions = Number(settings.questions);
const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
const percent = (share) => `${Math.round(100 * share)} %`;
const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

/** A new element of a class with attributes and children, which are nodes or texts. */
function make(tag, name = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function say(text, isBad = false) {
  const box = find(".message");
  find("span", box).textContent = text;
  box.classList.toggle("bad", isBad);
  box.hidden = !text;
  clearTimeout(say.timer);
  if (text && !isBad) say.timer = setTimeout(() => (box.hidden = true), 9000);
}

/** Wrap what an event starts: a failure is shown, with the words of the server. */
const guarded = (work) => async (event) => {
  event?.preventDefault?.();
  try {
    await work(event);
  } catch (problem) {
    say(problem.message, true);
  }
};

// ------------------------------------------------------------------ the server
let asking = null; // a promise while the dialog of the key is open

function askKey(text) {
  const dialog = find("dialog.key");
  asking ??= new Promise((resolve, reject) => {
    find("p", dialog).textContent = text;
    const end = (settle) => {
      asking = null;
      dialog.close();
      settle();
    };
    find("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("plm.key", find("input", dialog).value.trim());
      find("input", dialog).value = "";
      end(resolve);
    };
    dialog.oncancel = find(".cancel", dialog).onclick = () => end(() => reject(new Error("This server needs a key: reload the page to type it in.")));
    dialog.showModal();
  });
  return asking;
}

async function call(method, path, body) {
  for (;;) {
    if (settings.needsKey && !sessionStorage.getItem("plm.key"))
      await askKey("This server answers only with one of its keys. It stays in this tab until you close it.");
    const key = sessionStorage.getItem("plm.key");
    const headers = { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
    } catch {
      throw new Error("The server cannot be reached; try again.");
    }
    const found = await response.json().catch(() => null);
    if (response.ok) return found;
    if (response.status !== 401) throw Object.assign(new Error(found?.error?.message ?? `The server answers ${response.status}.`), { status: response.status });
    if (sessionStorage.getItem("plm.key") === key) sessionStorage.removeItem("plm.key");
    await askKey("The server does not know this key. Type another one.");
  }
}

/** The address of a user. Browsers take "." and ".." in an address for folders, however they are written. */
function at(user, what = "") {
  if (user === "." || user === "..") throw new Error(`A browser cannot send the id ${user}; take another one.`);
  if (!user.isWellFormed()) throw new Error("This id holds half of a character; take another one.");
  return `v1/users/${encodeURIComponent(user)}${what}`;
}

// ------------------------------------------------------------------ playground
const ground = find("#playground");
const people = [];

function addResponse(text = "") {
  const item = make("li", "", {}, make("span", "letter"), make("textarea", "", { rows: 2, dir: "auto", maxlength: 200000 }));
  item.append(make("button", "remove", { type: "button", "aria-label": "Remove", onclick: () => (item.remove(), letterResponses()) }, "×"));
  find("textarea", item).value = text;
  find(".responses").append(item);
  letterResponses();
}

const letterOf = (index) => (index < 26 ? String.fromCharCode(65 + index) : String(index + 1));

function letterResponses() {
  const items = findAll(".responses li");
  items.forEach((item, index) => {
    find(".letter", item).textContent = letterOf(index);
    find("textarea", item).setAttribute("aria-label", `Response ${letterOf(index)}`);
    find(".remove", item).hidden = items.length === 1;
  });
}

function showPeople() {
  const chips = people.map((user) =>
    make("span", "chip", {}, make("bdi", "", {}, user), make("button", "remove", { type: "button", "aria-label": `Remove ${user}`, onclick: () => (people.splice(people.indexOf(user), 1), showPeople()) }, "×")),
  );
  find(".chips").replaceChildren(make("span", "chip", {}, "Everyone"), ...chips);
}

function addPerson() {
  const input = find("#add-user");
  const user = input.value.trim();
  if (user) at(user);
  if (user && !people.includes(user)) people.push(user);
  input.value = "";
  showPeople();
}

/** Where a value lies on a scale, as a position of CSS. */
const place = (value, [low, high]) => `${Math.min(100, Math.max(0, (100 * (value - low)) / (high - low || 1)))}%`;

function gauge(low, middle, high, scale, into = make("div", "gauge", {}, make("div", "range"), make("div", "dot"))) {
  const range = find(".range", into);
  range.style.left = place(low, scale);
  range.style.width = `calc(${place(high, scale)} - ${place(low, scale)})`;
  find(".dot", into).style.left = place(middle, scale);
  return into;
}

/** Rewards of one person, each with the interval in which it lies with 95 % probability, on a scale of their own. */
function rewardsCard(user, found) {
  const rows = found.data.map(({ reward, reward_sd: sd, win_probability: win }) => ({ reward, win, half: 1.96 * (sd ?? 0), sd }));
  const ends = rows.flatMap(({ reward, half }) => [reward - half, reward + half]);
  const margin = 0.06 * (Math.max(...ends) - Math.min(...ends)) || 1;
  const scale = [Math.min(...ends) - margin, Math.max(...ends) + margin];
  const best = Math.max(...rows.map(({ reward }) => reward));
  const known = user === null ? "one model for all" : found.user_known ? "known" : "not known: the reward of everyone";
  const card = make("article", "card person", {}, make("header", "", {}, make("h2", "", {}, make("bdi", "", {}, user ?? "Everyone")), make("span", "hint", {}, known)));
  rows.forEach(({ reward, half, win, sd }, index) => {
    const value = make("span", "value", {}, reward.toFixed(2).replace("-", "−"), ...(sd === null ? [] : [` ± ${half.toFixed(2)}`]));
    const row = make("div", `reward${reward === best && rows.length > 1 ? " best" : ""}`, {}, make("span", "letter", {}, letterOf(index)), gauge(reward - half, reward, reward + half, scale), make("span", "chance", {}, win === null ? "" : percent(win)), value);
    card.append(row);
  });
  return card;
}

let comparison = 0;

async function compare() {
  const turn = ++comparison;
  addPerson();
  const responses = findAll(".responses textarea").map((area) => area.value);
  if (responses.some((text) => !text.trim())) throw new Error("A response is empty: write it, or remove it.");
  say("");
  const prompt = find("#prompt").value;
  const users = [null, ...people];
  const found = await Promise.all(users.map((user) => call("POST", "v1/rewards", { prompt, responses, ...(user !== null && { user }) })));
  if (turn === comparison) {
    const note = "Dots are rewards and bars their 95 % intervals, on a scale of each person: compare them within a card. The percentage is how often the person would take the response over another of them: compare it between people, too.";
    find(".results").replaceChildren(...found.map((one, index) => rewardsCard(users[index], one)), make("p", "hint", {}, note));
  }
}

async function openPlayground() {
  if (openPlayground.done) return;
  openPlayground.done = true;
  if (!people.length) people.push(...(await call("GET", "v1/users")).data.slice(0, 2).map(({ user }) => user));
  showPeople();
  await compare();
}

["A long walk by the sea, and then a book.", "See friends, cook together, and play games all night."].forEach((text) => addResponse(text));
find("form", ground).addEventListener("submit", guarded(compare));
find(".add-response").addEventListener("click", () => addResponse());
find(".add-user").addEventListener("click", guarded(addPerson));
find("#add-user").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) guarded(addPerson)(event);
});
ground.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) guarded(compare)(event);
});

// ------------------------------------------------------------------ ask
const interview = find("#ask");
const tabs = new BroadcastChannel("plm");
let session = null; // who is asked, about what, and what is known: see begin()

function showPart(name) {
  for (const part of ["start", "anew", "interview"]) find(`.${part}`, interview).hidden = part !== name;
}

/** Pairs of pasted lines of JSON. */
function parsePool(text) {
  const pool = [];
  text.split("\n").forEach((line, index) => {
    if (!line.trim()) return;
    let row;
    try {
      row = JSON.parse(line);
    } catch {
      throw new Error(`Line ${index + 1} of the questions is no JSON.`);
    }
    const responses = row?.responses ?? [row?.chosen, row?.rejected];
    if (!Array.isArray(responses) || responses.length !== 2 || responses.some((one) => typeof one !== "string"))
      throw new Error(`Line ${index + 1} of the questions: expected two responses, as texts.`);
    pool.push({ prompt: row.prompt ?? "", responses });
  });
  if (!pool.length || pool.length > Number(settings.maxPairs)) throw new Error(`Expected 1 to ${settings.maxPairs} questions, got ${pool.length}.`);
  return pool;
}

async function begin(user, pool) {
  at(user);
  const entered = { user, pool, question: null, about: null, shares: [], isAnew: false, isBusy: false };
  await refresh(entered);
  session = entered;
  sessionStorage.setItem("plm.session", JSON.stringify({ user, pool }));
  say("");
  const { about } = session;
  find(".anew .count").textContent = count(about.user?.num_pairs ?? 0, "answer");
  findAll(".who").forEach((place) => (place.textContent = user));
  if (about.user?.num_pairs && !about.num_kept) showPart("anew");
  else showInterview();
}

function leave() {
  session = null;
  sessionStorage.removeItem("plm.session");
  showPart("start");
}

/** Ask the server what to ask and what it believes by now. */
async function refresh(one) {
  const pool = one.pool && { pool: one.pool };
  const [next, about] = await Promise.all([
    call("POST", at(one.user, "/next-question"), { ...pool, skip_answered: true }),
    call("POST", at(one.user, "/beliefs"), { ...pool }),
  ]);
  const [question] = next.data;
  if (question && Math.random() < 0.5) question.responses.reverse(); // nobody shall learn that the left one is better
  Object.assign(one, { question, about, open: next.num_open, expected: next.expected_accuracy, isStale: false });
  one.shares.push(next.expected_accuracy.share);
}

const messagesOf = (prompt) => (typeof prompt === "string" ? [{ role: "", content: prompt }] : prompt).filter(({ content }) => content);

function showInterview() {
  const { question, about, open, pool, isAnew } = session;
  const total = pool?.length ?? numQuestions;
  showPart("interview");
  find(".counts").textContent = `${total - open} answered · ${open} left`;
  find(".fill").style.width = `${(100 * (total - open)) / total}%`;
  find(".asked").hidden = find(".tie").hidden = !question;
  find(".done").hidden = Boolean(question);
  find(".undo").disabled = isAnew || !about.num_kept;
  if (question) {
    find(".prompt").replaceChildren(
      ...messagesOf(question.prompt).map(({ role, content }) => make("p", "", { dir: "auto", "data-role": role }, ...(role ? [make("small", "", {}, role)] : []), content)),
    );
    findAll(".choice").forEach((button, side) => {
      button.classList.remove("chosen");
      find(".text", button).textContent = question.responses[side];
    });
  }
  showBeliefs();
}

function bar(name, share) {
  const fill = make("div", `fill ${name}`);
  fill.style.width = `${100 * share}%`;
  return [make("span", "", {}, name), make("div", "track", {}, fill), make("span", "num", {}, percent(share))];
}

function showBeliefs() {
  const { about, expected, shares } = session;
  find(".estimate output").textContent = percent(expected.share);
  find(".estimate output").title = `95 %: ${percent(expected.low)} to ${percent(expected.high)}`;
  gauge(expected.low, expected.share, expected.high, [0, 1], find(".estimate .gauge"));
  find(".since").textContent = ` (${percent(expected.low)} to ${percent(expected.high)})${shares.length > 1 ? `; ${percent(shares[0])} at the start of this visit` : ""}`;
  const [low, high] = [Math.min(...shares), Math.max(...shares)];
  const points = shares.map((share, turn) => `${(100 * turn) / (shares.length - 1 || 1)},${33 - (30 * (share - low)) / (high - low || 1)}`);
  find(".line polyline").setAttribute("points", shares.length > 1 ? points.join(" ") : "");

  const { foretold } = about;
  find(".foretold").hidden = !foretold;
  if (foretold) {
    const dots = foretold.chances.map((chance) => make("i", chance > 0.5 ? "" : chance < 0.5 ? "wrong" : "even", { title: `${percent(chance)} for what you chose` }));
    const { accuracy: own, population_accuracy: usual } = foretold;
    const right = ({ share }) => Math.round(2 * share * dots.length) / 2; // one half is half right
    find(".dots").replaceChildren(...dots);
    find(".foretold p").replaceChildren(
      make("b", "", {}, `${right(own)} of ${dots.length} right`),
      ` (${percent(own.low)} to ${percent(own.high)}); one model for all: ${right(usual)}. `,
      make("span", "hint", {}, "It asks where it is least sure, so elsewhere it should be right more often."),
    );
  }
  find(".beliefs").hidden = !about.data.length;
  find(".beliefs ul").replaceChildren(
    ...about.data.map(({ prompt, responses, chance, population_chance: usual }) => {
      const [liked, other] = chance >= 0.5 ? responses : [responses[1], responses[0]];
      const [own, others] = chance >= 0.5 ? [chance, usual] : [1 - chance, 1 - usual];
      const context = messagesOf(prompt).map(({ content }) => content).join(" ");
      return make(
        "li",
        "",
        {},
        ...(context ? [make("p", "hint clip", { dir: "auto" }, context)] : []),
        make("p", "liked clip", { dir: "auto" }, liked),
        make("p", "other clip", { dir: "auto" }, `over ${other}`),
        make("div", "shares", {}, ...bar("you", own), ...bar("others", others)),
      );
    }),
  );
}

/** Do something for the person who is asked, unless something is being done. */
let working = Promise.resolve();

function busily(work) {
  const one = session;
  if (!one || one.isBusy) return working;
  one.isBusy = true;
  const done = alone(one, work);
  working = done.catch(() => {});
  return done;
}

async function alone(one, work) {
  interview.classList.add("busy");
  try {
    say("");
    await work(one);
  } finally {
    one.isBusy = false;
    interview.classList.remove("busy");
    findAll(".chosen").forEach((button) => button.classList.remove("chosen"));
  }
}

/** Learn which side was chosen; null = neither. */
const answer = (side) =>
  busily(async (one) => {
    if (one.isStale) {
      await refresh(one);
      if (one === session) showInterview();
      return;
    }
    if (!one.question) return;
    const { prompt, responses } = one.question;
    if (side !== null) findAll(".choice")[side].classList.add("chosen");
    const pair = { prompt, chosen: responses[side ?? 0], rejected: responses[1 - (side ?? 0)], tie: side === null };
    try {
      await call("POST", at(one.user, "/pairs"), { pairs: [pair], anew: one.isAnew, must_exist: Boolean(one.about.user) });
    } catch (problem) {
      if (problem.status !== 409 || !one.about.user) throw problem;
      if (one === session) leave();
      say("This person was forgotten meanwhile, perhaps elsewhere; the answer was not kept.", true);
      return;
    }
    one.isAnew = false;
    one.isStale = true; // the question is answered, whatever becomes of the next one
    await refresh(one);
    if (one !== session) return;
    showInterview();
    if (find(".question").getBoundingClientRect().top < 0) find(".question").scrollIntoView();
  });

const undo = () =>
  busily(async (one) => {
    if (find(".undo").disabled) return;
    try {
      await call("POST", at(one.user, "/undo"), { version: one.about.user.version });
    } catch (problem) {
      if (problem.status !== 409 && problem.status !== 404) throw problem;
      say("The answers have changed meanwhile, perhaps in another tab; here is how they are now.", true);
    }
    await refresh(one);
    if (one === session) showInterview();
  });

function confirmForgetting(user) {
  const dialog = find("dialog.forgetting");
  find(".who", dialog).textContent = user;
  dialog.showModal();
  find(".no", dialog).focus();
  return new Promise((resolve) => {
    const end = (isSure) => {
      dialog.close();
      resolve(isSure);
    };
    dialog.oncancel = find(".no", dialog).onclick = () => end(false);
    find(".yes", dialog).onclick = () => end(true);
  });
}

/** Delete a user after a question; whether it was done. */
async function forget(user) {
  if (!(await confirmForgetting(user))) return false;
  await working; // an answer under way would bring the user back
  const { receipt, is_wiped: isWiped } = await call("DELETE", at(user));
  tabs.postMessage(user);
  if (session?.user === user) leave();
  const index = people.indexOf(user);
  if (index >= 0) people.splice(index, 1);
  showPeople();
  say(`Forgotten. ${isWiped ? "Nothing is left in the store of users." : "The database removes the bytes from its disk later."} Receipt ${receipt.slice(0, 12)}…`);
  return true;
}

tabs.onmessage = ({ data: user }) => {
  if (session?.user === user) {
    leave();
    say("You were forgotten in another tab.");
  }
};

find(".start form").addEventListener(
  "submit",
  guarded(() => begin(find("#person").value.trim(), numQuestions ? null : parsePool(find("#pool").value))),
);
find(".anew .go").addEventListener("click", () => {
  session.isAnew = true;
  showInterview();
});
findAll(".leave").forEach((button) => button.addEventListener("click", leave));
findAll(".choice").forEach((button, side) => button.addEventListener("click", guarded(() => answer(side))));
find(".tie").addEventListener("click", guarded(() => answer(null)));
find(".undo").addEventListener("click", guarded(undo));
find(".forget").addEventListener("click", guarded(() => session && forget(session.user)));
find(".to-playground").addEventListener("click", () => {
  if (!people.includes(session.user)) people.push(session.user);
  openPlayground.done = false;
});

// the keys of the questions, of which no part takes text
const KEYS = { ArrowLeft: () => answer(0), ArrowRight: () => answer(1), ArrowDown: () => answer(null), Backspace: undo };
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (interview.hidden || find(".interview", interview).hidden || find("dialog[open]") || !KEYS[event.key]) return;
  guarded(KEYS[event.key])(event);
});

// ------------------------------------------------------------------ users
const list = find("#users");
let shownAfter = -1;

const when = (seconds) => {
  const date = new Date(1000 * seconds);
  return make("time", "", { datetime: date.toISOString() }, date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }));
};

function userRow({ user, num_pairs: pairs, served, created, updated }) {
  const row = make("tr");
  const actions = make(
    "div",
    "row",
    {},
    make("button", "", { onclick: guarded(() => askPerson(user)) }, "Ask"),
    make("button", "", { onclick: () => (people.includes(user) || people.push(user), showPeople(), (openPlayground.done = false), (location.hash = "playground")) }, "Compare"),
    make("button", "danger", { onclick: guarded(async () => (await forget(user)) && openUsers()) }, "Forget"),
  );
  row.append(
    make("th", "", { scope: "row" }, make("bdi", "", {}, user)),
    make("td", "num", { "data-name": "Pairs" }, String(pairs)),
    make("td", "served", {}, make("span", `badge ${served}`, {}, served)),
    make("td", "", { "data-name": "Added" }, when(created)),
    make("td", "", { "data-name": "Changed" }, when(updated)),
    make("td", "acts", {}, actions),
  );
  return row;
}

async function askPerson(user) {
  location.hash = "ask";
  leave();
  find("#person").value = user;
  if (numQuestions) await begin(user, null);
}

async function openUsers() {
  shownAfter = -1;
  const body = find("tbody", list);
  const { num_users: total, data, next_after: next } = await call("GET", "v1/users");
  find(".summary").textContent = `${count(total, "user is", "users are")} known. Everybody else, and whoever is marked population, is served one model for all.`;
  body.replaceChildren(...data.map(userRow));
  if (!data.length) body.append(make("tr", "", {}, make("td", "empty", { colspan: 6 }, "Nobody yet. Whoever answers a question under Ask appears here.")));
  shownAfter = next;
  find(".more").hidden = next === null;
}

find(".more").addEventListener(
  "click",
  guarded(async () => {
    if (find(".more").disabled) return;
    find(".more").disabled = true;
    try {
      const { data, next_after: next } = await call("GET", `v1/users?after=${shownAfter}`);
      find("tbody", list).append(...data.map(userRow));
      shownAfter = next;
      find(".more").hidden = next === null;
    } finally {
      find(".more").disabled = false;
    }
  }),
);
find(".find").addEventListener(
  "submit",
  guarded(async () => {
    const found = await call("GET", at(find(".find input").value.trim()));
    find("tbody", list).replaceChildren(userRow(found));
    find(".more").hidden = true;
    say("");
  }),
);
find(".find input").addEventListener("input", (event) => {
  if (!event.target.value) guarded(openUsers)();
});

// ------------------------------------------------------------------ pages
async function openAsk() {
  const kept = JSON.parse(sessionStorage.getItem("plm.session") ?? "null");
  if (kept && !session) await begin(kept.user, kept.pool);
}

const OPEN = { playground: openPlayground, ask: openAsk, users: openUsers };

async function route() {
  const name = location.hash.slice(1) in OPEN ? location.hash.slice(1) : "playground";
  for (const page of findAll("main")) page.hidden = page.id !== name;
  for (const link of findAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  await OPEN[name]();
}

find(".message button").addEventListener("click", () => say(""));
window.addEventListener("hashchange", guarded(route));
showPeople();
guarded(async () => {
  find(".model").textContent = (await call("GET", "v1/models")).data[0].id;
})();
guarded(route)();
