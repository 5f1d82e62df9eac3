"""`python -m kvfold.parallel.follower CONFIG`: one rank beside rank 0, started by it."""

import sys

from kvfold.errors import KvfoldError
from kvfold.parallel.launch import follow
from kvfold.parallel.loading import config_from_json, shared_threads


def main() -> int:
    """Follows rank 0; the exit code is 2 where something is wrong, which stderr says in one line."""
    try:
        config = config_from_json(sys.argv[1])
        with shared_threads(config.ranks):
            follow(config)
    except KvfoldError as error:
        print(f"kvfold: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
