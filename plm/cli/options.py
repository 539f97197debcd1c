"""The options of the light commands."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from plm.messages import nearest


class OptionParser(argparse.ArgumentParser):
    """argparse with one-message errors that name the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        """See argparse."""
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse(self, args: list[str]) -> argparse.Namespace:
        """Parse all arguments or stop with one message."""
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"no option {unknown[0]!r}{nearest(unknown[0].partition('=')[0], options)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Stop with one message and status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help)\n")
