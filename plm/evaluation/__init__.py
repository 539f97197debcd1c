"""Statistics over users: intervals, comparisons, verdicts, and the tables, files, pages and pictures that show them."""

from plm.evaluation.comparison import compare, holm
from plm.evaluation.drift import drift_report, drift_table, run_folder, unseen_users_curve
from plm.evaluation.figures import calibration_figure, few_shot_figure, gain_figure
from plm.evaluation.page import (
    Link,
    Section,
    TableRow,
    html_page,
    html_part,
    markdown_table,
    png,
    write_figures,
    write_report,
)
from plm.evaluation.report import (
    USER_COLUMNS,
    UserRows,
    control_notes,
    few_shot_table,
    plain_table,
    read_user_rows,
    section_table,
    summary_table,
    user_rows,
)
from plm.evaluation.statistics import (
    MIN_USERS,
    cluster_bootstrap,
    is_flat,
    minimum_detectable_effect,
    summarize,
    summarize_few_shot,
)
from plm.evaluation.terminal import print_parts
from plm.evaluation.wording import difference, interval, p_value, points, shot_units, verdict

__all__ = [
    "MIN_USERS",
    "USER_COLUMNS",
    "Link",
    "Section",
    "TableRow",
    "UserRows",
    "calibration_figure",
    "cluster_bootstrap",
    "compare",
    "control_notes",
    "difference",
    "drift_report",
    "drift_table",
    "few_shot_figure",
    "few_shot_table",
    "gain_figure",
    "holm",
    "html_page",
    "html_part",
    "interval",
    "is_flat",
    "markdown_table",
    "minimum_detectable_effect",
    "p_value",
    "plain_table",
    "png",
    "points",
    "print_parts",
    "read_user_rows",
    "run_folder",
    "section_table",
    "shot_units",
    "summarize",
    "summarize_few_shot",
    "summary_table",
    "unseen_users_curve",
    "user_rows",
    "verdict",
    "write_figures",
    "write_report",
]
