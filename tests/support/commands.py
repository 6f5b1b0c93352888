"""Commands of ``fastrefine``, run in this process."""

from click.testing import CliRunner

from fastrefine.cli import cli


def fastrefine(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)


def told(done):
    """The output of a command that succeeded."""
    if done.exception:
        raise done.exception
    return done.output
