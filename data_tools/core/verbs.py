"""The verbs of a program: what is wrong with a command line, and the command that was meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

from data_tools.core.errors import UsageError
from data_tools.core.near import nearest, plain

# The base class of what the parser raises; typer exports only this one of its subclasses.
ParserError: type[Exception] = typer.BadParameter.__mro__[1]


class Verbs(TyperGroup):
    """The verbs of a program, with hints for the words of other programs.

    Attributes:
        words: other names of what the verbs do, and the hint to give; equal after `plain`.
        options: names of options elsewhere, and those here that may be meant; the first that a verb has is named.
        arguments: metavar of an argument that is missing, and what it may be.
    """

    program: ClassVar[str] = ""
    words: ClassVar[Mapping[str, str]] = {}
    options: ClassVar[Mapping[str, Sequence[str]]] = {}
    arguments: ClassVar[Mapping[str, str]] = {}

    def elsewhere(self) -> Mapping[str, str]:
        """Return the hints for verbs of the other program, by verb."""
        return {}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb that the arguments start with; raise UsageError with the one that was meant."""
        if args[0] not in self.commands:
            raise UsageError(f"there is no verb '{args[0]}'", hint=self.verb_hint(args[0]))
        return super().resolve_command(ctx, args)

    def verb_hint(self, word: str) -> str:
        """Return which verb was meant, else all verbs."""
        own = {verb: f"did you mean '{self.program} {verb}'?" for verb in self.commands}
        there = self.elsewhere()
        exact = {plain(verb): hint for hints in (there, self.words, own) for verb, hint in hints.items()}
        if plain(word) in exact:
            return exact[plain(word)]
        for hints in (own, {**there, **self.words}):
            near = nearest(word, hints)
            if near:
                return hints[near]
        return f"the verbs are {', '.join(self.commands)}; {self.program} VERB --help shows the options of one"

    def option_hint(self, verb: str | None, option: str, has: Collection[str], arguments: Sequence[str]) -> str:
        """Return which option was meant.

        Args:
            verb: the verb; None before a verb.
            option: what was written.
            has: the options of the verb.
            arguments: all arguments of the command.
        """
        if verb is None:
            near = nearest(option, has)
            if near:
                return f"did you mean {near}?"
            return f"options follow a verb: {self.program} VERB --help; the verbs are {', '.join(self.commands)}"
        known = next(
            (ours for theirs, each in self.options.items() if theirs == option for ours in each if ours in has), None
        )
        longer = [each for each in has if len(option) > 3 and each.startswith(option)]
        found = known or (longer[0] if longer else None) or nearest(option, has)
        return f"did you mean {found}?" if found else f"{self.program} {verb} --help shows the options"


def parser_error(error: Any, name: str, arguments: Sequence[str]) -> UsageError:
    """Return what the parser of the program `name` refuses as an error with a hint."""
    if error.ctx is None:  # an option without its value
        hint = f"{getattr(error, 'option_name', 'an option')} is followed by a value; see {name} {arguments[0]} --help"
        return UsageError(error.format_message().rstrip("."), hint=hint)
    command, verbs = error.ctx.command, error.ctx.find_root().command
    verb = None if command is verbs else command.name
    path = error.ctx.command_path
    where = path if verb is None else verb
    kind = type(error).__name__
    if kind == "NoSuchOption":
        has = [option for each in command.params for option in (*each.opts, *each.secondary_opts) if option[0] == "-"]
        hint = verbs.option_hint(verb, error.option_name, has, arguments)
        return UsageError(f"{where} has no option {error.option_name}", hint=hint)
    if kind == "MissingParameter":
        missing = _shown(error.param)
        what = verbs.arguments.get(missing, "")
        return UsageError(f"{where} needs {missing}", hint=what or _usage(path, command.params))
    if "unexpected extra argument" in error.format_message():
        hint = f"{_usage(path, command.params)}; quote texts that have spaces"
        return UsageError(error.format_message().rstrip("."), hint=verbs.arguments.get(f"extra of {verb}", hint))
    return UsageError(error.format_message().rstrip("."), hint=f"{path} --help shows what is allowed")


def _shown(parameter: Any) -> str:
    """Return a parameter as a user writes it."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar or parameter.name.upper())


def _usage(path: str, parameters: Sequence[Any]) -> str:
    """Return a command with all that it needs."""
    needed = [each for each in parameters if each.required]
    words = [_shown(each) for each in needed if each.param_type_name == "argument"]
    words += [f"{_shown(each)} {each.name.upper()}" for each in needed if each.param_type_name == "option"]
    return " ".join([path, *words])
