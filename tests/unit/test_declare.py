"""declare(): a developer's own structs, flags and ioctls, its errors, its integers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvmpriv import DeclarationError, declare
from kvmpriv.errors import ArgumentError
from kvmpriv.fd import REQUEST_NAMES

from . import abi


def test_structs_flags_and_ioctls_of_a_new_abi() -> None:
    new = declare(
        """
        #include <linux/kvm.h>
        #define KVM_EXAMPLE_FLAG (1ULL << 63)   /* the highest */
        #define KVM_EXAMPLE_MASK \\
                (KVM_EXAMPLE_FLAG | \\
                 KVM_MEM_READONLY)
        enum kvm_example_kind { KVM_EXAMPLE_A = 4, KVM_EXAMPLE_B };
        struct kvm_example {
            __u64 gpa;
            struct kvm_userspace_memory_region region;  // the core's structs are known
            union { __u32 word; __u8 bytes[4]; };
        };
        #define KVM_EXAMPLE      _IOWR(KVMIO, 0xd7, struct kvm_example)
        #define KVM_EXAMPLE_STOP _IO(KVMIO, 0xd8)
        """
    )
    assert new.KVM_EXAMPLE_FLAG == 1 << 63
    assert new.KVM_EXAMPLE_MASK == 1 << 63 | 2
    assert (new.KVM_EXAMPLE_A, new.KVM_EXAMPLE_B) == (4, 5)
    assert new.sizeof("struct kvm_example") == 48
    assert new.KVM_EXAMPLE == 3 << 30 | 48 << 16 | 0xAE << 8 | 0xD7
    assert new.KVM_EXAMPLE_STOP == 0xAED8
    assert REQUEST_NAMES[new.KVM_EXAMPLE] == "KVM_EXAMPLE"
    value = new.new("struct kvm_example", gpa=0x1000, word=0x01020304)
    assert (value.gpa, list(value.bytes), value.region.slot) == (0x1000, [4, 3, 2, 1], 0)
    with pytest.raises(ArgumentError, match="no field gap: it has gpa, region, word, bytes"):
        new.new("struct kvm_example", gap=1)
    with pytest.raises(ArgumentError, match="gpa can't be 0x10000000000000000"):
        new.new("struct kvm_example", gpa=1 << 64)
    with pytest.raises(ArgumentError, match="word can't be 0x100000000"):
        new.new("struct kvm_example", word=1 << 32)
    with pytest.raises(ArgumentError, match="an integer is required"):
        new.new("struct kvm_example", gpa="0x1000")
    with pytest.raises(ArgumentError, match="too many initializers"):
        new.new("struct kvm_example", bytes=[0] * 5)
    for call in (new.new, new.sizeof):
        with pytest.raises(ArgumentError, match="'struct kvm_exmaple' was not declared"):
            call("struct kvm_exmaple")
    with pytest.raises(AttributeError, match="KVM_EXAMPLE_FLAGS was not declared"):
        _ = new.KVM_EXAMPLE_FLAGS


def test_a_namespace_is_shown_in_short() -> None:
    many = declare("\n".join(f"#define A{n} {n}" for n in range(100)))
    assert repr(many) == "<Declared: A0, A1, A2, and 97 more>"
    assert repr(declare("#define A 1")) == "<Declared: A>"
    assert "A99" in dir(many)


def test_a_struct_that_the_tree_has_changed() -> None:
    changed = declare(
        """
        struct kvm_enc_region { __u64 addr; __u64 size; __u64 flags; };
        #define KVM_CHANGED _IOR(KVMIO, 0xbb, struct kvm_enc_region)
        """
    )
    assert changed.sizeof("struct kvm_enc_region") == 24
    assert changed.KVM_CHANGED == 0x8018AEBB
    assert changed.sizeof("struct kvm_regs") == 144, "the others are as they were"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("#define A (1 << \n", r"line 1: A: not a constant expression"),
        ("\n\n#define A NOBODY_KNOWS", r"line 3: A: NOBODY_KNOWS is not defined"),
        ("#define A(x) (x)", r"line 1: A: a macro with arguments"),
        ("\n#ifdef CONFIG_KVM\n#endif", r"line 2: #ifdef is not supported"),
        ("#define A BIT(3)", r"line 1: A: BIT\(…\) is a macro that is not known here"),
        ("#define A (1 / 0)", r"line 1: A: division by zero"),
        ("#define A (1 << 32)", r"line 1: A: shift by 32 in 32 bits"),
        ("#define A 18446744073709551616", r"line 1: A: 18446744073709551616 is too large"),
        ("#define A _IOW(KVMIO, 1, struct kvm_nobody)", r"line 1: A: sizeof\(struct kvm_nobody\)"),
        ("#define A _IOW(KVMIO, 256, __u64)", r"line 1: A: _IOW\(0xae, 0x100, 8\): out of range"),
        ('#define A "text"', r'line 1: A: "text" is not an integer'),
        ("#define A 1.5", r"line 1: A: 1.5 is not an integer"),
        ("struct kvm_x { __u64 a; int b }", r"cannot parse"),
        ("struct kvm_x { u64 a; };", r"Invalid specifier list"),
        ("#define A _IO(KVMIO)", r"line 1: A: _IO takes 2 arguments"),
        ("\nstruct s { struct s a; };", r"line 2: sizeof\(struct s\): recursive structure"),
        ("struct a { struct b x; }; struct b { struct a x; };", r"line 1: sizeof\(struct a\): rec"),
        ("union u { union u x; };", r"line 1: sizeof\(union u\): recursive structure"),
        ("struct a { struct nobody x; };", r"'struct a.x' has ctype 'struct nobody' of unknown"),
        ("\n\nint a[1<<62];", r"line 3: `int a\[1<<62\]` is not a type: remove variables"),
        ("struct s { int a[1<<62]; };", r"line 1: sizeof\(struct s\): array size would overflow"),
        (f"struct s {{ char a[{1 << 62}]; }};", r"sizeof\(struct s\): \d+ bytes are too many"),
        ("extern int stdin;", r"line 1: `extern int stdin` is not a type"),
        ("int ioctl(int fd, long r);", r"line 1: `int ioctl\(int fd, long r\)` is not a type"),
        ("struct s {" * 2000 + "}" * 2000 + ";", "nested too deeply"),
        (f"#define A {'(' * 5000}1{')' * 5000}", "line 1: A: it is nested too deeply"),
        ("enum e { A = 99999999999999999999 };", "A: 99999999999999999999 is too large"),
        ("#define A -9223372036854775807 - 2", r"line 1: A: -9223372036854775809 does not fit"),
    ],
)
def test_an_error_names_the_line_and_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        declare(text)


def test_declare_works_after_declarations_that_were_nested_too_deeply() -> None:
    with pytest.raises(DeclarationError):
        declare("struct s {" * 2000)
    assert declare("struct s { __u32 a; };").sizeof("struct s") == 4


def expression(dice: random.Random, depth: int = 3) -> str:
    """A random constant expression that C defines (no overflow of signed integers)."""
    if depth == 0 or dice.random() < 0.2:
        value = dice.choice([dice.randrange(8), dice.randrange(1 << 31)])
        form = dice.choice(["{}", "{:#x}"])
        return form.format(value) + dice.choice(["", "U", "L", "UL", "LL", "ULL"])
    a, b = expression(dice, depth - 1), expression(dice, depth - 1)
    return dice.choice(
        [
            f"({a} {dice.choice([*'&|^<>', '<=', '>=', '==', '!=', '&&', '||'])} {b})",
            f"({a} + 1ull)",
            f"({a} - 1ull)",
            f"(({a} & 0xffff) << {dice.randrange(15)})",
            f"({a} >> {dice.randrange(31)})",
            f"({a} / {dice.randrange(1, 99)})",
            f"({a} % {dice.choice(['7', '7u', '0x10ULL'])})",
            f"({a} ? {b} : {dice.randrange(9)}ULL)",
            f"(({dice.choice(['__u8', '__s8', '__u16', '__u32', '__s32', '__u64', '__s64'])}){a})",
            f"(~{a})",
            f"(!{a})",
            f"(sizeof(struct kvm_regs) * ({a} & 0xff))",
        ]
    )


def test_a_compiler_agrees_with_every_expression(tmp_path: Path) -> None:
    """Widths, signs and promotions of integers are those of the C compiler."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown when the test fails
    dice = random.Random(seed)
    expressions = [expression(dice) for _ in range(500)]
    header = "\n".join(f"#define X{n} {text}" for n, text in enumerate(expressions))
    prints = "\n".join(f'printf("%lld\\n", (long long)(X{n}));' for n in range(len(expressions)))
    source = "\n".join(
        ["#include <stdio.h>", "#include <linux/kvm.h>", header, f"int main(void) {{ {prints} }}"]
    )
    answers = abi.compile_and_run(source, tmp_path, "-w").split()
    declared = declare(header)
    for n, text in enumerate(expressions):
        ours = getattr(declared, f"X{n}")
        assert ours & (1 << 64) - 1 == int(answers[n]) & (1 << 64) - 1, text
