"""C declarations of a kernel ABI, evaluated without a compiler.

cffi reads structs but neither ``(1UL << 2)`` nor ``_IOW(…)``; this module reads both.  It serves
twice: ``make cdefs`` writes ``kvmpriv/cdefs`` with it, and :func:`declare` lets a developer
use a struct, a flag or an ioctl of his own kernel tree the day he writes it.  A C compiler is its
judge in the unit tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cffi import FFI

    from .cdefs.cffi_types import Cdata, CType, Ffi

__all__ = ["DeclarationError", "Declared", "declare"]

PRELUDE = """
typedef int8_t __s8;   typedef uint8_t __u8;
typedef int16_t __s16; typedef uint16_t __u16;
typedef int32_t __s32; typedef uint32_t __u32;
typedef long long __s64; typedef unsigned long long __u64;
"""

_NONE, _WRITE, _READ = 0, 1, 2  # <asm-generic/ioctl.h>
_IOC = {"_IO": _NONE, "_IOW": _WRITE, "_IOR": _READ, "_IOWR": _READ | _WRITE}
_IOC_SIZE_MAX = (1 << 14) - 1

#: The largest struct, in bytes.  What is larger is a mistake, and cffi computes sizes modulo 2^64.
_SIZE_MAX = 1 << 30

_TOO_DEEP = "it is nested too deeply"


class DeclarationError(ArgumentError):
    """The header text can't be used.  The message names the line and what to do."""


class _Int(NamedTuple):
    """A C integer: its value, its width in bits, whether it is unsigned."""

    value: int
    bits: int = 32
    unsigned: bool = False

    @classmethod
    def of(cls, value: int, bits: int, *, unsigned: bool) -> _Int:
        if unsigned:
            return cls(value & ((1 << bits) - 1), bits, unsigned=True)
        if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
            raise DeclarationError(f"{value} does not fit in a signed integer of {bits} bits")
        return cls(value, bits, unsigned=False)


def _literal(text: str) -> _Int:
    """An integer constant with the type that C gives it (C11 6.4.4.1)."""
    body = text.rstrip("uUlL")
    suffix = text[len(body) :].lower()
    octal = len(body) > 1 and body[0] == "0" and body[1] not in "xXbB"
    value = int(body, 8 if octal else 0)
    decimal = body[0] != "0" or body == "0"
    for bits in (64,) if "l" in suffix else (32, 64):
        if "u" not in suffix and value < 1 << (bits - 1):
            return _Int(value, bits, unsigned=False)
        if ("u" in suffix or not decimal) and value < 1 << bits:
            return _Int(value, bits, unsigned=True)
    raise DeclarationError(f"{text} is too large for any integer type")


def _quotient(a: int, b: int) -> int:
    if b == 0:
        raise DeclarationError("division by zero")
    magnitude = abs(a) // abs(b)
    return magnitude if (a < 0) == (b < 0) else -magnitude


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _quotient,
    "%": lambda a, b: a - b * _quotient(a, b),
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
}
_COMPARISON: dict[str, Callable[[int, int], bool]] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _converted(left: _Int, right: _Int) -> tuple[_Int, _Int]:
    """Both with the type that an operator gives them in common (C11 6.3.1.8)."""
    bits = max(left.bits, right.bits)
    unsigned = any(side.unsigned and side.bits == bits for side in (left, right))
    return (
        _Int.of(left.value, bits, unsigned=unsigned),
        _Int.of(right.value, bits, unsigned=unsigned),
    )


def _typed(value: int) -> _Int:
    """A known constant, with the type it would have if it were written in decimal."""
    if 0 <= value < 1 << 63:
        return _literal(str(value))
    return _Int(value, 64, unsigned=value >= 0)


class _Evaluator:
    """Evaluates constant expressions, given the constants and the types known so far."""

    def __init__(self, ffi: FFI, constants: Mapping[str, int]) -> None:
        self._ffi = ffi
        self._known = {name: _typed(value) for name, value in constants.items()}

    def define(self, name: str, value: _Int) -> None:
        self._known[name] = value

    def evaluate(self, text: str) -> _Int:
        from pycparser import CParser, c_parser

        # A type as an argument of _IOW() is no C expression; its size is one.
        text = re.sub(
            r"\b(_IO[WR]{1,2})\(([^,()]+),([^,()]+),([^()]+)\)", r"\1(\2,\3,sizeof(\4))", text
        )
        # Casts and sizeof need to know that a name is a type.
        types = "".join(f"typedef int {name};\n" for name in self._ffi.list_types()[0])
        try:
            tree = CParser().parse(f"{types}long x = {text};")
            return self._visit(tree.ext[-1].init)
        except c_parser.ParseError as error:
            raise DeclarationError(f"not a constant expression: {text.strip()}") from error
        except RecursionError:
            raise DeclarationError(_TOO_DEEP) from None

    def _visit(self, node: Any) -> _Int:
        visit = getattr(self, f"_visit_{type(node).__name__}", None)
        if visit is None:
            raise DeclarationError(f"{type(node).__name__} is not supported in a constant")
        result: _Int = visit(node)
        return result

    def _visit_Constant(self, node: Any) -> _Int:
        if "int" not in node.type or node.value.startswith("'"):
            raise DeclarationError(f"{node.value} is not an integer")
        return _literal(node.value)

    def _visit_ID(self, node: Any) -> _Int:
        try:
            return self._known[node.name]
        except KeyError:
            raise DeclarationError(f"{node.name} is not defined (declare it too)") from None

    def _visit_UnaryOp(self, node: Any) -> _Int:
        if node.op == "sizeof":
            return _Int(self._sizeof(node.expr), 64, unsigned=True)
        operand = self._visit(node.expr)
        if node.op == "!":
            return _Int(int(not operand.value))
        value = {"-": -operand.value, "~": ~operand.value, "+": operand.value}.get(node.op)
        if value is None:
            raise DeclarationError(f"operator {node.op} is not supported in a constant")
        return _Int.of(value, operand.bits, unsigned=operand.unsigned)

    def _visit_BinaryOp(self, node: Any) -> _Int:
        left, right = self._visit(node.left), self._visit(node.right)
        if node.op in ("<<", ">>"):
            if not 0 <= right.value < left.bits:
                raise DeclarationError(f"shift by {right.value} in {left.bits} bits")
            if node.op == ">>":
                return left._replace(value=left.value >> right.value)
            shifted = left.value << right.value
            if not left.unsigned and left.value >= 0 and shifted < 1 << left.bits:
                # gcc keeps the bits of (1 << 31); the kernel's headers rely on that.
                shifted -= (shifted >> (left.bits - 1)) << left.bits
            return _Int.of(shifted, left.bits, unsigned=left.unsigned)
        if node.op in ("&&", "||"):
            both, one = left.value and right.value, left.value or right.value
            return _Int(int(bool(both if node.op == "&&" else one)))
        left, right = _converted(left, right)
        a, b = left.value, right.value
        if node.op in _COMPARISON:
            return _Int(int(_COMPARISON[node.op](a, b)))
        return _Int.of(_ARITHMETIC[node.op](a, b), left.bits, unsigned=left.unsigned)

    def _visit_TernaryOp(self, node: Any) -> _Int:
        yes, no = _converted(self._visit(node.iftrue), self._visit(node.iffalse))
        return yes if self._visit(node.cond).value else no

    def _visit_Cast(self, node: Any) -> _Int:
        type_name = self._type_name(node.to_type)
        value = int(self._ffi.cast(type_name, self._visit(node.expr).value))
        bits = 8 * self._ffi.sizeof(type_name)
        # Types narrower than int are promoted to it: what they hold fits, signed.
        unsigned = bits >= 32 and int(self._ffi.cast(type_name, -1)) > 0
        return _Int(value, max(32, bits), unsigned)

    def _visit_FuncCall(self, node: Any) -> _Int:
        name = node.name.name
        if name not in _IOC:
            raise DeclarationError(f"{name}(…) is a macro that is not known here: write its value")
        arguments = [self._visit(argument).value for argument in node.args.exprs]
        if len(arguments) != (2 if name == "_IO" else 3):
            raise DeclarationError(f"{name} takes {2 if name == '_IO' else 3} arguments")
        kind, number, size = (*arguments, 0)[:3]
        if kind > 0xFF or number > 0xFF or size > _IOC_SIZE_MAX:
            raise DeclarationError(f"{name}({kind:#x}, {number:#x}, {size}): out of range")
        return _Int(_IOC[name] << 30 | size << 16 | kind << 8 | number, 32, unsigned=True)

    def _type_name(self, node: Any) -> str:
        from pycparser import c_generator

        return str(c_generator.CGenerator().visit(node))

    def _sizeof(self, node: Any) -> int:
        if type(node).__name__ != "Typename":
            raise DeclarationError("sizeof takes a type here")
        return _checked_size(self._ffi, self._type_name(node))


def _checked_size(ffi: FFI, type_name: str) -> int:
    """The size of a type, in bytes.  DeclarationError if C has no such type."""
    import cffi

    sizeof: Callable[[CType], int] = ffi.sizeof  # type: ignore[assignment]  # types-cffi: str
    try:
        kind = ffi.typeof(type_name)
        sizes = [ffi.sizeof(type_name)]
        if kind.kind in ("struct", "union"):
            inner = [field.type for _, field in kind.fields]
            sizes += [sizeof(part) for part in inner if part.cname[-2:] != "[]"]
    except (
        *(ValueError, TypeError, OverflowError, NotImplementedError),
        *(cffi.FFIError, cffi.CDefError),
    ) as error:
        raise DeclarationError(f"sizeof({type_name}): {error}") from None
    if max(sizes) > _SIZE_MAX:
        raise DeclarationError(f"sizeof({type_name}): {max(sizes)} bytes are too many for a struct")
    return sizes[0]


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """The text without comments, continued lines joined: (line number, line)."""
    blank = lambda match: re.sub(r"[^\n]", " ", match.group())  # noqa: E731
    text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.DOTALL)
    lines: list[tuple[int, str]] = []
    pending = ""
    start = 1
    for number, line in enumerate(text.split("\n"), 1):
        if not pending:
            start = number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        lines.append((start, pending + line))
        pending = ""
    if pending:
        lines.append((start, pending))
    return lines


def _statements(types: str) -> Iterator[tuple[int, str]]:
    """The declarations of a header, one by one: (line number, text without its semicolon)."""
    depth = begin = 0
    for match in re.finditer(r"[{};]", types):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if match.group() == ";" and depth == 0:
            text = types[begin : match.start()]
            first = begin + len(text) - len(text.lstrip())
            yield types.count("\n", 0, first) + 1, text.strip()
            begin = match.end()


def _check_statements(types: str) -> None:
    """DeclarationError for a variable or a function: cffi would look for it in this process."""
    for number, text in _statements(types):
        if not re.fullmatch(
            r"typedef\b.*|(struct|union|enum)\b\s*\w*\s*(\{.*\})?", text, re.DOTALL
        ):
            shown = " ".join(text.split())[:60]
            raise DeclarationError(
                f"line {number}: `{shown}` is not a type: remove variables and functions, and use"
                " #define for constants"
            )


def _check_structs(types: str, ffi: FFI) -> None:
    """DeclarationError for a struct or union that C does not allow: one that contains itself."""
    for match in re.finditer(r"\b(struct|union)\s+(\w+)\s*\{", types):
        number = types.count("\n", 0, match.start()) + 1
        try:
            _checked_size(ffi, " ".join(match.groups()))
        except DeclarationError as error:
            raise DeclarationError(f"line {number}: {error}") from None


class _Text(NamedTuple):
    """A header's text, divided: what cffi reads, and the macros (line number, name, body)."""

    types: str
    macros: list[tuple[int, str, str]]


def _divide(text: str) -> _Text:
    declarations: list[str] = []
    macros: list[tuple[int, str, str]] = []
    for number, line in _logical_lines(text):
        directive = re.match(r"\s*#\s*(\w+)\s*(.*)", line)
        if directive is None:
            declarations.append(line)
            continue
        declarations.append("")
        word, rest = directive.groups()
        if word == "define":
            name, body = re.fullmatch(r"(\w*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
            if body.startswith("(") or not name:
                raise DeclarationError(
                    f"line {number}: {name}: a macro with arguments can't be declared"
                )
            if body.strip():
                macros.append((number, name, body))
        elif word not in ("include", "pragma"):
            raise DeclarationError(
                f"line {number}: #{word} is not supported: remove the conditional and keep only the"
                " declarations that apply"
            )

    types = "\n".join(declarations)
    # An array's length is the one place where a type needs a macro; cffi can't look it up.
    for _, name, body in macros:
        if re.fullmatch(r"\s*(0x[0-9a-fA-F]+|[0-9]+)\s*", body):
            types = re.sub(rf"\[\s*{name}\s*\]", f"[{body.strip()}]", types)
    return _Text(types, macros)


class Parsed(NamedTuple):
    """What a header declares: its constants, and which of them are ioctls (number -> name)."""

    constants: dict[str, int]
    requests: dict[int, str]


def parse(text: str, ffi: FFI, known: Mapping[str, int]) -> Parsed:
    """Give `ffi` the types of a header and evaluate its macros.

    `known` holds constants that the text may use.  Raises DeclarationError.
    """
    import cffi

    types, macros = _divide(text)
    _check_statements(types)
    try:
        ffi.cdef(types)
    except (cffi.FFIError, cffi.CDefError, OverflowError) as error:
        raise DeclarationError(str(error)) from error
    except RecursionError:
        raise DeclarationError(f"the declarations can't be read: {_TOO_DEEP}") from None
    _check_structs(types, ffi)

    evaluator = _Evaluator(ffi, known)
    constants: dict[str, int] = {}
    requests: dict[int, str] = {}
    library = ffi.dlopen(None)
    for name in dir(library):  # the enumerators
        constants[name] = value = int(getattr(library, name))
        if not -1 << 63 <= value < 1 << 64:
            raise DeclarationError(f"{name}: {value} is too large for any integer type")
        evaluator.define(name, _typed(value))
    for number, name, body in macros:
        try:
            value_ = evaluator.evaluate(body)
        except DeclarationError as error:
            raise DeclarationError(f"line {number}: {name}: {error}") from None
        evaluator.define(name, value_)
        constants[name] = value_.value
        if re.search(r"\b_IO[WR]{0,2}\(", body):
            requests[value_.value] = name
    return Parsed(constants, requests)


class Declared:
    """What :func:`declare` read: each constant is an attribute, and `new` makes a struct."""

    #: The cffi object that knows the types.
    ffi: Ffi
    #: Name -> value: the macros and the enumerators of the header.
    constants: dict[str, int]

    def __init__(self, ffi: Ffi, constants: dict[str, int]) -> None:
        self.ffi = ffi
        self.constants = constants

    def __getattr__(self, name: str) -> int:
        constants: dict[str, int] = self.__dict__["constants"]
        try:
            return constants[name]
        except KeyError:
            raise AttributeError(f"{name} was not declared") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.constants]

    def __repr__(self) -> str:
        names = [*self.constants]
        if len(names) > 4:
            names[3:] = [f"and {len(names) - 3} more"]
        return f"<Declared: {', '.join(names) or 'no constants'}>"

    def new(self, type_name: str, /, **fields: object) -> Cdata:
        """Make a struct, 0 but for `fields`, and return a pointer that owns it.

        ``abi.new("struct kvm_foo", gpa=0x1000)``.  A field may be a number, a list for an array,
        or a dict for a struct.  ArgumentError for a type or a field that was not declared, and
        for a value that does not fit.  A type checker does not know the fields.
        """
        from .fd import new_struct

        pointer = self._pointer(type_name)
        if unknown := sorted(fields.keys() - set(_field_names(pointer.item))):
            raise ArgumentError(
                f"{type_name} has no field {unknown[0]}:"
                f" it has {', '.join(_field_names(pointer.item))}"
            )
        try:
            return new_struct(pointer, fields)
        except (TypeError, KeyError) as error:
            raise ArgumentError(f"{type_name}({fields}): {error}") from None

    def sizeof(self, type_name: str) -> int:
        """The size of a declared type, in bytes.  ArgumentError if it was not declared."""
        return self.ffi.sizeof(self._pointer(type_name).item)

    def _pointer(self, type_name: str) -> CType:
        try:
            pointer = self.ffi.typeof(f"{type_name} *")
            self.ffi.sizeof(pointer.item)
        except Exception as error:  # noqa: BLE001  # cffi.FFIError and CDefError, not loaded here
            raise ArgumentError(f"{type_name!r} was not declared: {error}") from None
        return pointer


def _field_names(kind: CType) -> list[str]:
    """The fields of a struct or a union, with those of its parts that have no name."""
    if kind.kind not in ("struct", "union"):
        return []
    names = []
    for name, field in kind.fields or ():
        names += [name] if name else _field_names(field.type)
    return names


def _header(name: str) -> str:
    """The text of one of our own headers: from the wheel, or from the checkout."""
    package = Path(__file__).parent
    shipped = package / "cdefs" / "include" / f"{name}.h"
    if shipped.exists():
        return shipped.read_text()
    return (package.parent / "cdefs" / f"{name}.h").read_text()


def declare(header_text: str) -> Declared:
    """Declare structs, flags and ioctls of a kernel header, to be used by the raw layer.

    The text is plain C as in a uapi header: structs, unions, enums, typedefs, and ``#define`` of
    integer constants, ``_IO``, ``_IOR``, ``_IOW`` and ``_IOWR`` among them.  ``__u8``…``__s64``
    and all of ``cdefs/kvm.h`` are known.  The text may declare a struct of kvm.h again, for a tree
    that has changed it.

        abi = kvmpriv.declare('''
            struct kvm_foo { __u64 gpa; __u64 flags; };
            #define KVM_FOO _IOW(KVMIO, 0xd7, struct kvm_foo)
        ''')
        vm.ioctl(abi.KVM_FOO, abi.new("struct kvm_foo", gpa=0x1000))

    Messages name the declared ioctls, too.  DeclarationError (an ArgumentError) names the line.
    """
    import cffi

    from .cdefs import kvm as kvm_h
    from .fd import register_requests

    core = PRELUDE + _divide(_header("kvm")).types
    for tag in re.findall(r"\bstruct\s+(\w+)\s*\{", header_text):
        core = re.sub(rf"^struct {tag} \{{.*?^\}};", "", core, flags=re.DOTALL | re.MULTILINE)
    known = {name: value for name, value in vars(kvm_h).items() if isinstance(value, int)}
    ffi = cffi.FFI()
    ffi.cdef(core)
    parsed = parse(header_text, ffi, known)
    register_requests(parsed.requests)
    return Declared(cast("Ffi", ffi), parsed.constants)
