"""``--lang``, and Typer's own words in the reader's language: help, and what it says of arguments."""

import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from gradkeel.language import LANGUAGES, choose, heard, language, padded, say, shown, width, wrapped

OPTION = "--lang"
UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """All commands: reads ``--lang`` wherever it stands, for help is in that language too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Say in the reader's language what is wrong with the arguments."""
        return _told(super().make_context, *args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Likewise for a command's own arguments."""
        return _told(super().invoke, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Choose the language, and leave the rest to Typer."""
        choose(None)
        args, chosen = _without_option(args)
        if chosen is not None and chosen not in LANGUAGES:
            raise typer.BadParameter(f"{chosen!r} is not one of 'en', 'zh'", ctx, param_hint=OPTION)
        choose(chosen)
        formatter = ctx.formatter_class
        ctx.formatter_class = _plain(formatter if language() == "en" else _formatter(formatter))
        for command in self.commands.values():
            own = {"formatter_class": ctx.formatter_class}
            command.context_class = type("Context", (type(command).context_class,), own)
            command.short_help = shown(heard(_line(command.help)))
        return super().parse_args(ctx, args)


def _without_option(args: list[str]) -> tuple[list[str], str | None]:
    """The arguments without ``--lang``, and its value; what follows ``--`` is nobody's option."""
    stop = args.index("--") if "--" in args else len(args)
    kept, chosen, words = [], None, iter(args[:stop])
    for word in words:
        name, equals, value = word.partition("=")
        if name == OPTION:
            chosen = value if equals else next(words, "")
        else:
            kept.append(word)
    return [*kept, *args[stop:]], chosen


def _told(run: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return run(*args, **kwargs)
    except UsageError as error:
        if language() == "en" or type(error).__name__ == "NoArgsIsHelpError":
            raise
        if error.ctx is not None:
            hint = say("Try '{command} --help' for help.", command=error.ctx.command_path)
            print(error.ctx.get_usage(), shown(hint), "", sep="\n", file=sys.stderr)
        print(shown(say("Error: {what}", what=heard(error.format_message()))), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _of_option(text: str) -> str:
    """An option's help, and what Typer writes after it in brackets."""
    found = re.fullmatch(r"(.*?) \\?\[((?:default|required).*)", text)
    return f"{shown(heard(found[1]))}  [{shown(heard(found[2]))}" if found else shown(heard(text))


def _plain(formatter: type[Any]) -> type[Any]:
    """A formatter of help that names an argument and leaves out its Python type, which some Typers write behind it."""

    class Plain(formatter):  # type: ignore[misc]
        def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
            super().write_usage(prog, re.sub(r"\{(\w+)\}", r"\1", args), prefix)

        def write_dl(self, rows: Any, *args: Any, **kwargs: Any) -> None:
            super().write_dl([(re.sub(r" <.*>$", "", name), text) for name, text in rows], *args, **kwargs)

    return Plain


def _formatter(formatter: type[Any]) -> type[Any]:
    """A formatter of help that translates, and wraps by columns rather than characters."""

    class Formatter(formatter):  # type: ignore[misc]
        def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
            words = re.sub(r"[A-Z]{3,}", lambda word: shown(heard(word[0])), args)
            self.write(f"{shown(say('Usage: '))}{prog} {words}\n")

        def write_heading(self, heading: str) -> None:
            super().write_heading(shown(heard(heading)))

        def write_text(self, text: str) -> None:
            indent = " " * self.current_indent
            for line in wrapped(shown(heard(_line(text))), self.width - self.current_indent):
                self.write(f"{indent}{line}\n")

        def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
            rows = list(rows)
            first = min(max(width(name) for name, _ in rows), col_max) + col_spacing
            left = " " * self.current_indent
            for name, text in rows:
                lines = wrapped(_of_option(_line(text)), max(self.width - first - 2, 10))
                head = padded(name, first)
                if width(name) > first - col_spacing:
                    self.write(f"{left}{name}\n")
                    head = " " * first
                for line in lines:
                    self.write(f"{left}{head}{line}".rstrip() + "\n")
                    head = " " * first

    return Formatter
