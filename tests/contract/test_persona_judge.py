"""PersonaJudge passes the contract, asking a scripted server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from plm.backbones import PlainText
from plm.method import PersonalizationMethod
from plm.methods.persona_judge import PersonaJudge
from plm.testing import TokenContract
from plm.testing.judge import ChatServer
from tests.http_servers import answering
from tests.scripted_judge import Script


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    judge = ChatServer(Script())
    with answering(judge), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLM_JUDGE_URL", judge.url)
        yield


class TestPersonaJudge(TokenContract):
    num_users = 3
    fit_epochs = 2

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        few = {"num_demos": 2, "bootstraps": 1, "max_pairs": 5, "max_bytes": 4096, "concurrency": 1}
        return PersonaJudge(num_users, feature_dim, PlainText().spec(), **few)
