"""Promises of stochastic rounding: a C program draws and rounds the same, and the mean is the number itself."""

import ctypes
import shutil
import subprocess
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.int8.stochastic_rounding import IntegerGenerator, round_stochastically

seeds = st.integers(-(2**70), 2**70)
# beyond 2^24 every float32 is a whole number
numbers = st.floats(-(2.0**26), 2.0**26, width=32)


def documented_c() -> str:
    """The C of the two docstrings, and a loop around the second."""
    function = IntegerGenerator.__doc__.split("In C::")[1].split("The constants")[0]
    expression = round_stochastically.__doc__.split("::")[1].split("Args:")[0].strip()
    return textwrap.dedent(function) + textwrap.dedent(f"""
        void draw(uint32_t *state, uint32_t *out, int count) {{
            for (int i = 0; i < count; i++) out[i] = next(state);
        }}
        void round_all(uint32_t *pointer, const float *in, float *out, int count) {{
            uint32_t state = *pointer;
            for (int i = 0; i < count; i++) {{
                float x = in[i];
                out[i] = {expression};
            }}
            *pointer = state;
        }}
    """)


@pytest.fixture(scope="module")
def c_library(tmp_path_factory):
    """The docstrings' C, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler found: cc, gcc or clang")
    folder = tmp_path_factory.mktemp("c")
    (folder / "rounding.c").write_text("#include <math.h>\n#include <stdint.h>\n" + documented_c())
    command = [compiler, "-std=c99", "-O2", "-shared", "-fPIC", "rounding.c", "-o", "rounding.so", "-lm"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(folder / "rounding.so"))


def integers_in_c(library, state: ctypes.c_uint32, count: int) -> list[int]:
    out = (ctypes.c_uint32 * count)()
    library.draw(ctypes.byref(state), out, count)
    return list(out)


def rounded_in_c(library, state: ctypes.c_uint32, x: torch.Tensor) -> torch.Tensor:
    values = x.flatten().tolist()
    out = (ctypes.c_float * len(values))()
    library.round_all(ctypes.byref(state), (ctypes.c_float * len(values))(*values), out, len(values))
    return torch.tensor(list(out), dtype=torch.float32).view(x.shape)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 0x61C88647, 2**32, -1, 10**20])
def test_the_integers_are_those_of_c(c_library, seed):
    generator, state = IntegerGenerator(seed), ctypes.c_uint32(seed % 2**32)
    for count in (1, 2, 0, 1000, 7):
        drawn = generator.integers(count)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == integers_in_c(c_library, state, count)
        assert generator.state == state.value


def test_the_first_integers_stay_those_that_devices_have():
    assert IntegerGenerator(0).integers(3).tolist() == [1684164658, 3653269916, 2939563536]


def hard_numbers() -> torch.Tensor:
    """Of all sizes, and near whole numbers, where a difference of floats might round."""
    torch.manual_seed(0)
    whole = torch.randint(-128, 128, (1000,)).float()
    above = torch.nextafter(whole, torch.tensor(torch.inf))
    below = torch.nextafter(whole, torch.tensor(-torch.inf))
    sizes = torch.randn(4000) * 10.0 ** torch.linspace(-44, 30, 4000)
    weights = torch.randn(4000) * 60
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, 2**23 - 0.5, -(2**23) + 0.5, 2.0**24, 2.0**31 - 2**24, 1e-45, -1e-45])
    return torch.cat([whole, above, below, sizes, weights, special])


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_numbers_are_rounded_as_in_c_bit_for_bit(c_library, seed):
    generator, state = IntegerGenerator(seed), ctypes.c_uint32(seed)
    x = hard_numbers()
    for part in (x, x[:3], x[:0], -x, x[:1]):
        rounded = round_stochastically(part, generator)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded.view(torch.int32), rounded_in_c(c_library, state, part).view(torch.int32))
        assert generator.state == state.value


@pytest.mark.parametrize("seed", [0, 5])
def test_a_fraction_equal_to_what_is_drawn_is_rounded_down_as_in_c(c_library, seed):
    fractions = (IntegerGenerator(seed).integers(1000) >> 8).float() / 2**24
    for x, expected in ((fractions, 0), (fractions + 2**-24, 1)):
        assert (round_stochastically(x, IntegerGenerator(seed)) == expected).all()
        assert (rounded_in_c(c_library, ctypes.c_uint32(seed), x) == expected).all()


def test_numbers_are_drawn_for_in_the_order_of_their_indexes(c_library):
    """However they lie in memory: weights may be in PyTorch's channels_last order, or transposed."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 2) * 10
    state = ctypes.c_uint32(7)
    expected = rounded_in_c(c_library, state, x)
    strided = torch.zeros(4, 3, 5, 4)[..., ::2].copy_(x)
    for other in (x, x.to(memory_format=torch.channels_last), strided, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(round_stochastically(other, IntegerGenerator(7)), expected)
    assert not torch.equal(round_stochastically(x.transpose(0, 1), IntegerGenerator(7)).transpose(0, 1), expected)


@settings(deadline=None, max_examples=50)
@given(seeds, st.lists(st.integers(0, 50), max_size=6))
def test_the_state_advances_by_the_count_however_the_integers_are_asked_for(seed, counts):
    together, in_parts = IntegerGenerator(seed), IntegerGenerator(seed)
    parts = [in_parts.integers(count) for count in counts]
    assert torch.equal(together.integers(sum(counts)), torch.cat([*parts, torch.zeros(0, dtype=torch.int64)]))
    assert together.state == in_parts.state == (seed + 0x9E3779B9 * sum(counts)) % 2**32
    resumed = IntegerGenerator(in_parts.state)
    assert torch.equal(resumed.integers(3), together.integers(3))


def test_integers_are_even_over_32_bits_and_differ():
    count = 2**18
    for seed in (0, 1, 2**31):
        drawn = IntegerGenerator(seed).integers(count)
        assert 0 <= drawn.min() < 2**17
        assert 2**32 - 2**17 < drawn.max() < 2**32
        assert len(drawn.unique()) == count  # the counter has its whole period, and the mixing loses nothing
        ones = torch.stack([(drawn >> bit & 1).double().mean() for bit in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / count**0.5
        centred = drawn.double() / 2**32 - 0.5
        neighbours = (centred[1:] * centred[:-1]).mean() / (1 / 12)
        assert neighbours.abs() < 5 / count**0.5


@settings(deadline=None, max_examples=50)
@given(seeds, st.lists(numbers, min_size=1, max_size=20))
def test_the_result_is_the_whole_number_below_or_above(seed, values):
    x, generator = torch.tensor(values), IntegerGenerator(seed)
    before = x.clone()
    rounded = round_stochastically(x, generator)
    assert ((rounded == x.floor()) | (rounded == x.ceil())).all()
    assert torch.equal(x, before)
    assert generator.state == (seed + 0x9E3779B9 * len(values)) % 2**32


@settings(deadline=None, max_examples=50)
@given(seeds, st.lists(st.integers(-(2**31), 2**31 - 128).map(float), min_size=1, max_size=20))
def test_whole_numbers_stay_and_are_drawn_for(seed, values):
    x, generator = torch.tensor(values), IntegerGenerator(seed)
    assert torch.equal(round_stochastically(x, generator), x)
    assert generator.state == (seed + 0x9E3779B9 * len(values)) % 2**32


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("value", [0.5, 0.1, -0.1, -3.75, 126.99, -127.01, 1e-3, 0.0009765625])
def test_the_mean_is_the_number_itself(value, seed):
    count = 200_000
    x = torch.full((count,), value)
    rounded = round_stochastically(x, IntegerGenerator(seed)).double()
    fraction = float(x[0].double() - x[0].double().floor())
    # five standard deviations of a mean; without flakes, since the seeds are fixed
    assert abs(float(rounded.mean()) - float(x[0])) < 5 * (fraction * (1 - fraction) / count) ** 0.5


def test_steps_too_small_for_a_whole_number_add_up_on_average():
    """What rounding to the nearest would lose: a thousand steps of a hundredth."""
    generator, weights = IntegerGenerator(0), torch.zeros(1000)
    for _ in range(1000):
        weights = round_stochastically(weights + 0.01, generator)
    standard_deviation = (1000 * 0.01 * 0.99) ** 0.5
    assert abs(float(weights.mean()) - 10) < 5 * standard_deviation / 1000**0.5
    assert abs(float(weights.std()) - standard_deviation) < 0.1 * standard_deviation
