"""Pickles, parsed and never run.

A pickle is a program that calls functions by name. `PickleReader` interprets it itself: the opcodes come from the
standard library's disassembler, which only parses, and what a name stands for comes from a closed table of builders
of plain data. What reads a kind of pickle says which operations and names that kind has; all else is refused.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd2.runtime.errors import UserError, first_line

EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
LITERALS = "BININT[12]?|LONG1|BINFLOAT|(SHORT_)?BIN(UNICODE|BYTES)8?"
MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError, MemoryError)
"""what a truncated or damaged pickle raises"""
MOST_STACK = 1_000_000
"""things at a time; what pickles itself makes needs a few thousand"""


@dataclass(frozen=True)
class Global:
    """A name in a pickle. Only a name: nothing is imported."""

    name: str


class PickleReader:
    """Reads one pickle into plain data. Subclasses say of what kind."""

    kind: str
    """in messages: "EDM's pickles" """
    operations: re.Pattern[str]
    """their names in `pickletools`"""
    most_operations: int
    """each can cost a hundred bytes of memory"""

    def __init__(self) -> None:
        self._call: dict[str, Callable[..., Any]] = {}
        """name → what makes its data of arguments"""
        self._new: dict[str, Callable[[], Any]] = {}
        """name → what makes its data of nothing"""
        self._known: set[str] = set()

    def read_file(self, path: Path) -> Any:
        """What a pickle holds.

        Raises:
            UserError: it is truncated, malformed or asks for anything that its kind does not need.
            OSError: it cannot be read.
        """
        try:
            # A map's read() never makes room for more than there is, whatever length the pickle claims.
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return self.read(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except MALFORMED as error:
            why = printable(first_line(error))
            raise UserError(f"{path}: not one of {self.kind}, truncated or damaged ({why})") from error

    def read(self, file: Any) -> Any:
        """What the pickle in `file` (binary, at its beginning) holds.

        Raises:
            UserError: a name or an operation that this kind does not need, absurd sizes.
            One of MALFORMED: it is truncated or damaged.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        arg: Any
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if count >= self.most_operations:
                raise UserError(f"holds more than {self.most_operations} operations: none of {self.kind}")
            if len(stack) + len(marks) > MOST_STACK:
                raise UserError(f"holds more than {MOST_STACK} things side by side: none of {self.kind}")
            if not self.operations.fullmatch(opcode.name):
                raise UserError(
                    f"uses the pickle operation {opcode.name}, which {self.kind} do not: refused, not run"
                )
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE" as name:
                    stack.append(name == "NEWTRUE")
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE" as name:
                    stack.append(EMPTY[name]())
                case name if name == "UNICODE" or re.fullmatch(LITERALS, name):
                    stack.append(arg)
                case "MARK":
                    marks.append(len(stack))
                case "LIST":
                    stack.append(self._extended([], since_mark()))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    length = int(name[-1])
                    stack[-length:] = [tuple(stack[-length:])]
                case "APPEND" | "APPENDS" as name:
                    items = since_mark() if name == "APPENDS" else [stack.pop()]
                    self._extended(stack[-1], items)
                case "ADDITEMS":
                    items = since_mark()
                    of_type(set, stack[-1]).update(of_type(str, item) for item in items)
                case "SETITEM" | "SETITEMS" as name:
                    items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    _set_items(stack[-1], items)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(arg)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(arg)])
                case "GLOBAL":
                    stack.append(self._global(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    attribute = stack.pop()
                    stack.append(self._global(of_type(str, stack.pop()), of_type(str, attribute)))
                case "REDUCE":
                    arguments = of_type(tuple, stack.pop())
                    stack.append(self._made(self._call, stack.pop(), arguments))
                case "NEWOBJ":
                    arguments = of_type(tuple, stack.pop())
                    stack.append(self._made(self._new, stack.pop(), arguments))
                case "BUILD":
                    state = stack.pop()
                    self._build(stack[-1], state)
                case name:
                    raise NotImplementedError(f"operation {name}")
        raise EOFError

    def _extended(self, target: Any, items: list[Any]) -> Any:
        """The pickle operations APPEND and APPENDS."""
        of_type(list, target).extend(items)
        return target

    def _build(self, target: Any, state: Any) -> None:
        """The pickle operation BUILD: sets the state of an object that was just made."""
        raise TypeError(f"a state for a {type(target).__name__}")

    def _global(self, module: str, attribute: str) -> Global:
        name = f"{module}.{attribute}"
        if name not in self._known:
            raise UserError(f"asks for {printable(name)}, which is not part of {self.kind}: refused, nothing was run")
        return Global(name)

    @staticmethod
    def _made(table: dict[str, Callable[..., Any]], what: Any, arguments: tuple[Any, ...]) -> Any:
        name = of_type(Global, what).name
        if name not in table:
            raise TypeError(f"{name} cannot be made this way")
        return table[name](*arguments)


def of_type(kind: type[Any], value: Any) -> Any:
    """The value, if it is of just that type. Raises TypeError."""
    if type(value) is not kind and not (kind is Tensor and isinstance(value, Tensor)):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def printable(text: str) -> str:
    """Foreign text as part of a line."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _set_items(target: Any, items: list[Any]) -> None:
    # Tuples as keys could be nested so that hashing them takes for ever.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise TypeError(f"expected a string or a number as a key, found {type(key).__name__}")
        of_type(dict, target)[key] = value
