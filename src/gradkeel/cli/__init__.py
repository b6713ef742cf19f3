"""The command line: one module a command, and nothing heavy imported before it is needed."""

import sys


def main() -> None:
    """Run ``gradkeel``; exits with 2 and one line where the extra ``cli`` is not installed."""
    try:
        import rich  # noqa: F401 - asked for here, so that every command can rely on it
        import typer  # noqa: F401
    except ImportError as error:
        from gradkeel.language import say, shown

        told = say(
            "gradkeel's commands need {name}, which is not installed; run: pip install 'gradkeel[cli,report]'",
            name=error.name,
        )
        print(shown(told), file=sys.stderr)
        sys.exit(2)
    from gradkeel.cli.app import app

    app(prog_name="gradkeel")
