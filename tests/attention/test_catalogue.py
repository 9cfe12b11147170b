"""Every record of the catalogue, held to what it claims."""

import dataclasses
import doctest
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import catalogue, positions, softmax_attention
from attention.__main__ import example, main
from attention.catalogue import PATTERNS, Mechanism
from models.layers.attention import accepts
from pallas_kernels.choose import IMPLEMENTATIONS
from tests.numerics import assert_close

RECORDS = tuple(catalogue.mechanisms().values())
BATCH, TOKENS, HEADS, KV_HEADS, FEATURES, WIDTH = 2, 12, 4, 2, 8, 6
ROOT = Path(__file__).parents[2]

each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.slug)


quick = pytest.mark.usefixtures("quick_compilation")


def inputs(tokens=TOKENS, keys=None, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (
        (BATCH, tokens, HEADS, FEATURES),
        (BATCH, keys or tokens, KV_HEADS, FEATURES),
        (BATCH, keys or tokens, KV_HEADS, WIDTH),
    )
    # NumPy's: each shape that JAX cuts or changes outside of a program is a program of its own.
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def inputs_of(record, **sizes):
    """Returns inputs: of one query for all tokens, or other arrays, where it takes such."""
    if record.arguments:
        return other_inputs(record, **sizes)
    query, key, value = inputs(**sizes)
    return [query[:, :1] if record.one_query else query, key, value]


def other_inputs(record, tokens=TOKENS, keys=None, dtype=jnp.float32):
    """Returns inputs of a mechanism that takes no query, key and value."""
    first, others = (
        list(record.example_arguments(BATCH, n, dtype).values()) for n in (tokens, keys or tokens)
    )
    return [first[0], *others[1:]]


def of_tokens(record, arrays):
    """Returns which of the arrays hold something of each token."""
    if record.arguments:
        return [x.ndim > 2 for x in arrays]
    return [not record.one_query, True, True]


def output_shape(record, arrays):
    return arrays[0].shape if record.arguments else (BATCH, TOKENS, HEADS, WIDTH)


def tokens_of(record, arrays, tokens):
    """Returns a slice of the tokens; a query for all tokens stays as it is."""
    varies = of_tokens(record, arrays)
    return [x[:, tokens] if v else x for x, v in zip(arrays, varies, strict=True)]


def parameters(record):
    return inspect.signature(record.function).parameters


def options(record, causal):
    """Returns the keyword that makes a call causal or not, where there is a choice."""
    return {"is_causal": causal} if "is_causal" in parameters(record) else {}


def call(record, **keywords):
    """Returns the mechanism's function with options that suit few tokens."""
    return functools.partial(record.function, **record.small, **keywords)


@functools.cache
def compiled(record, **keywords):
    """Returns the mechanism's function as one program: one by one its operations compile longer.

    The tests of a record share its programs, as long as they call them with the same shapes.
    """
    return jax.jit(call(record, **keywords))


def changed_tokens(record, arrays, token, which, **keywords):
    """Returns for every query whether its output changes with a token of some of the arrays."""
    function = compiled(record, **keywords)
    changed = [x.copy() for x in arrays]
    for i in which:
        if of_tokens(record, arrays)[i]:
            changed[i][:, token : token + 1] += 1
    before, after = (np.asarray(function(*x)) for x in (arrays, changed))
    return np.any(before != after, axis=(0, *range(2, before.ndim)))


@each_record
def test_public_names(record):
    names = [record.slug, *record.exports]
    if record.step:
        names += [f"{record.slug}_step", f"init_{record.slug}_state"]
    if record.has_weights:
        names.append(f"init_{record.slug}")
    for name in names:
        assert getattr(attention, name) is record.exports[name]
        assert name in attention.__all__
        assert name in dir(attention)
    assert catalogue.get(record.slug) is record


@each_record
def test_has_oracle_and_test(record):
    assert (ROOT / f"tests/oracles/{record.slug}.py").is_file()
    assert (ROOT / f"tests/attention/{record.family}/test_{record.slug}.py").is_file()


@each_record
def test_uniform_keywords(record):
    taken = parameters(record)
    first = list(taken.values())[: len(record.inputs)]
    assert record.arguments or record.inputs == ("query", "key", "value")
    assert all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in first)
    assert taken["implementation"].kind is inspect.Parameter.KEYWORD_ONLY
    own = {p for p in record.patterns if p.startswith("self")}
    assert ("is_causal" in taken) == (len(own) == 2)
    assert not record.takes_segments or taken["segment_ids"].default is None
    assert ("params" in taken) == record.has_weights
    if record.step:
        assert next(iter(inspect.signature(record.step).parameters)) == "state"
        names = [*state_sizes(record), "dtype"]
        taken = inspect.signature(record.init_state).parameters
        assert list(taken)[: len(names)] == names
        assert all(p.kind is p.KEYWORD_ONLY for p in list(taken.values())[len(names) :])


def state_sizes(record):
    """Returns the sizes that a state is made of, by name and in order."""
    sizes = dict(batch=BATCH, max_length=TOKENS)
    if not record.arguments:
        return sizes | dict(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=FEATURES, value_dim=WIDTH
        )
    known = inspect.signature(record.arguments).parameters
    names = list(inspect.signature(record.init_state).parameters)
    return sizes | {name: known[name].default for name in names[2 : names.index("dtype")]}


@quick
@each_record
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(record, pattern):
    kind, order = pattern.split()
    causal = order == "causal"
    keywords = options(record, causal)
    only_not_causal = not keywords and f"{kind} non-causal" in record.patterns
    if pattern not in record.patterns and (kind == "self" or only_not_causal):
        # It cannot be asked for, and the other one is what it does (the test of that pattern).
        assert not keywords
        return
    arrays = inputs_of(record, keys=None if kind == "self" else TOKENS + 5)
    if pattern not in record.patterns:
        if record.one_query:
            return  # it is cross-attention by nature, and causal
        with pytest.raises(ValueError, match=record.inputs[1]):
            call(record, **keywords)(*arrays)
        return
    out = jax.eval_shape(call(record, **keywords), *arrays)
    assert out.shape == output_shape(record, arrays)
    if pattern == "self causal":
        return  # test_no_token_sees_a_later_one looks closer
    every = range(len(arrays))
    which = (2,) if causal and record.selects_ahead else every
    for token in (1, TOKENS - 1):
        differs = changed_tokens(record, arrays, token, which, **keywords)
        assert differs[token]
        assert differs[:token].any() == (not causal)
    if kind == "cross":
        beyond = changed_tokens(record, arrays, TOKENS + 2, every[1:], **keywords)
        assert beyond.any() == (not causal)


@quick
@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize(
    "record",
    [r for r in RECORDS if "self causal" in r.patterns],
    ids=lambda record: record.slug,
)  # fmt: skip
def test_no_token_sees_a_later_one(record, seed):
    """In shapes drawn at random, each token in turn is changed: no output before it differs."""
    rng = np.random.default_rng([seed, *record.slug.encode()])
    batch, kv_heads, group = (int(n) for n in rng.integers(1, 4, 3))
    tokens, features, width = (
        int(rng.integers(2, 48)),
        2 * int(rng.integers(1, 7)),
        rng.integers(1, 9),
    )
    if record.arguments:
        arrays = list(record.example_arguments(batch, tokens, jnp.float32).values())
    else:
        arrays = [
            rng.standard_normal((batch, tokens, heads, size)).astype(np.float32)
            for heads, size in (
                (group * kv_heads, features),
                (kv_heads, features),
                (kv_heads, width),
            )
        ]
        arrays[0] = arrays[0][:, :1] if record.one_query else arrays[0]
    change = [
        v and not (record.selects_ahead and i < 2) for i, v in enumerate(of_tokens(record, arrays))
    ]

    @jax.jit
    def outputs(*arrays):
        def changed(token):
            at = jnp.arange(tokens) == token
            return call(record, **options(record, causal=True))(
                *(
                    x + (at.reshape(-1, *[1] * (x.ndim - 2)) if c else 0)
                    for x, c in zip(arrays, change, strict=True)
                )
            )

        # One after another, in one program: what is not changed is the same to the last bit.
        return jax.lax.map(changed, jnp.arange(tokens + 1))

    *outs, before = np.asarray(outputs(*arrays))
    itself = []
    for token, out in enumerate(outs):
        differs = np.any(out != before, axis=(0, *range(2, out.ndim)))
        assert not differs[:token].any()
        itself.append(differs[token])
    # Where others are selected, a token may be in no group, and then sees not even itself.
    assert any(itself) if record.selects_ahead else all(itself)


@quick
@each_record
def test_implementations(record):
    arrays = inputs_of(record)
    every = tuple(range(len(arrays)))
    runnable = [name for name in record.implementations if not name.startswith("pallas")]
    assert "reference" in runnable
    others = [name for name in runnable if name != "reference"] or [None]
    cases = {causal: options(record, causal) for causal in (True, False)}
    for keywords in cases.values() if cases[True] else ({},):

        def loss(name, keywords, *arrays):
            out = call(record, implementation=name, **keywords)(*arrays)
            return jnp.sum(jnp.sin(out)), out

        @jax.jit
        def everything(*arrays, loss=loss, keywords=keywords):
            """One program compiles sooner than one for each implementation."""
            return [
                jax.grad(functools.partial(loss, name, keywords), argnums=every, has_aux=True)(
                    *arrays
                )
                for name in ("reference", *others)
            ]

        reference, *found = everything(*arrays)
        for gradients_and_results in found:
            assert_close(gradients_and_results, reference, factor=2)
    for name in IMPLEMENTATIONS:
        if name not in record.implementations:
            with pytest.raises(NotImplementedError, match=rf"{record.slug}: .*'{name}'"):
                jax.eval_shape(call(record, implementation=name), *arrays)
    with pytest.raises(ValueError, match=rf"{record.slug}: implementation"):
        jax.eval_shape(call(record, implementation="fastest"), *arrays)


@quick
@each_record
def test_segments_are_separate_documents(record):
    if not record.takes_segments:
        return  # they cannot be given
    if not any(pattern.startswith("self") for pattern in record.patterns):
        pytest.fail("say here how a mechanism without self-attention is tested")
    # Two lengths only: each is a program.
    lengths = ((5, TOKENS, 5), (TOKENS, 5, 5))
    arrays = inputs_of(record, tokens=TOKENS + 10)
    ids = np.array([np.repeat([4, 2, 7], row) for row in lengths])
    for keywords in map(dict, {tuple(options(record, causal).items()) for causal in (True, False)}):
        function = compiled(record, **keywords)
        packed = np.asarray(function(*arrays, segment_ids=ids))
        for row, counts in enumerate(lengths):
            for end, count in zip(np.cumsum(counts), counts, strict=True):
                part = slice(end - count, end)
                alone = np.asarray(function(*tokens_of(record, arrays, part)))
                assert_close(packed[row, part], alone[row])


@quick
@each_record
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_low_precision(record, dtype):
    function = compiled(record, **options(record, causal=True))
    low = inputs_of(record, dtype=dtype)
    assert jax.eval_shape(function, *low).dtype == dtype
    if record.kernel is not None and dtype == jnp.float16:
        return  # the tests of the kernels say how near it is
    out = function(*low)
    assert_close(out, function(*(x.astype(np.float32) for x in low)), dtype)


@quick
@pytest.mark.parametrize(
    "record", [r for r in RECORDS if r.step], ids=lambda record: record.slug
)  # fmt: skip
def test_steps_are_one_pass(record):
    arrays, prompt = inputs_of(record), 5
    varies = of_tokens(record, arrays)
    expected = compiled(record, **options(record, causal=True))(*arrays)
    own = {n: x for n, x in record.small.items() if accepts(record.init_state, n)}
    step = functools.partial(record.step, **record.small)

    def one(arrays, state, token):
        here = [
            jax.lax.dynamic_slice_in_dim(x, token, 1, axis=1) if v else x
            for x, v in zip(arrays, varies, strict=True)
        ]
        out, state = step(state, *here)
        return state, out[:, 0]

    @jax.jit
    def prompt_and_steps(state, *arrays):
        out, after = step(state, *tokens_of(record, arrays, slice(0, prompt)))
        _, outs = jax.lax.scan(functools.partial(one, arrays), after, jnp.arange(prompt, TOKENS))
        return jnp.concatenate((out, jnp.moveaxis(outs, 0, 1)), axis=1), after

    state = record.init_state(*state_sizes(record).values(), jnp.float32, **own)
    out, after = prompt_and_steps(state, *arrays)
    shapes, shapes_after = (jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, after))
    assert shapes_after == shapes
    assert_close(out, expected, factor=2)


def degree(cost):
    """Returns a power of T that a cost does not exceed by more than a tenth when T doubles."""
    powers = {"O(T)": 1, "O(T log T)": 1.2, "O(T^1.5)": 1.5, "O(T^2)": 2}
    if cost not in powers:
        pytest.fail(f"{cost}: say in this test how it grows")
    return powers[cost]


def bytes_made(program):
    """Returns the size of all arrays that a traced program makes: its memory at most.

    The arrays of a loop's body count once: each turn has them anew.
    """
    total = sum(x.nbytes for x in getattr(program, "consts", ()))
    for equation in program.eqns:
        made = (variable.aval for variable in equation.outvars)
        total += sum(x.size * x.dtype.itemsize for x in made if hasattr(x, "size"))
        inner = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns"))
        total += sum(bytes_made(value) for value in inner if hasattr(value, "eqns"))
    return total


@each_record
def test_memory(record):
    function = functools.partial(record.function, **options(record, causal=True))

    def loss(*arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    def gradient_bytes(tokens):
        if record.arguments:
            arrays = tuple(record.example_arguments(1, tokens).values())
        else:
            x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
            query = jax.ShapeDtypeStruct((1, 1, 2, 16), jnp.float32) if record.one_query else x
            arrays = query, x, x
        every = tuple(range(len(arrays)))
        return bytes_made(jax.jit(jax.grad(loss, argnums=every)).trace(*arrays).jaxpr)

    assert gradient_bytes(131072) <= (1.1 * 2 ** degree(record.memory)) ** 2 * gradient_bytes(32768)


def run_examples(member, module):
    finder = doctest.DocTestFinder(recurse=False)
    names = {"jax": jax, "jnp": jnp, "np": np} | vars(module)
    ran = 0
    for test in finder.find(member, member.__name__, globs=names):
        report = []
        outcome = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert outcome.failed == 0, "".join(report)
        ran += outcome.attempted
    return ran


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def program(function, tree, fixed, arrays):
    """Returns a call's result, as one program for the arrays where nothing is fixed."""
    arrays = iter(arrays)
    leaves = [next(arrays) if leaf is jax.Array else leaf for leaf in fixed]
    arguments, keywords = jax.tree.unflatten(tree, leaves)
    return function(*arguments, **keywords)


def whole(function):
    """Returns a function as one program of its arrays; what is no array is fixed in it."""

    def call(*arguments, **keywords):
        leaves, tree = jax.tree.flatten((arguments, keywords))
        fixed = tuple(jax.Array if isinstance(x, jax.Array) else x for x in leaves)
        arrays = [x for x in leaves if isinstance(x, jax.Array)]
        if not arrays:
            return function(*arguments, **keywords)
        return program(function, tree, fixed, arrays)

    return call


@pytest.fixture
def whole_calls(record, monkeypatch):
    """Runs a record's functions as programs: operation by operation they compile longer."""
    for member in filter(inspect.isfunction, record.exports.values()):
        if member is not record.init_state:
            monkeypatch.setattr(attention, member.__name__, whole(member))
            monkeypatch.setattr(inspect.getmodule(member), member.__name__, whole(member))


@quick
@each_record
@pytest.mark.usefixtures("whole_calls")
def test_examples(record):
    for member in record.exports.values():
        ran = run_examples(member, inspect.getmodule(member))
        if member in (record.function, record.step):
            assert ran, f"{member.__name__} has no example"


@quick
@pytest.mark.parametrize("function", ("rope", "alibi_slopes", "lrpe", "init_lrpe_theta"))
def test_examples_of_positions(function):
    assert run_examples(getattr(positions, function), positions)


@quick
@each_record
@pytest.mark.usefixtures("whole_calls")
def test_description(record, capsys):
    assert main([record.slug]) == 0
    text = capsys.readouterr().out
    for expected in (*record.exports, *record.patterns, *IMPLEMENTATIONS, record.title):
        assert expected in text
    for name in IMPLEMENTATIONS:
        served = "yes" if name in record.implementations else "no: ."
        assert re.search(rf"^  {name} +{served}", text, re.MULTILINE)
    program = example(record)
    assert program.splitlines()[-1].strip() in text
    exec(compile(program, record.slug, "exec"), {})
    wanted = re.findall(r"^print\(.*  # (.*)$", program, re.MULTILINE)
    assert capsys.readouterr().out.split("\n") == [*wanted, ""]


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "attention", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_command():
    table = command()
    assert table.returncode == 0, table.stderr
    lines = table.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["mechanism", *catalogue.mechanisms()]
    assert all(line.count("\t") == len(catalogue.HEADER) - 1 for line in lines)

    unknown = command("lightening_atention")
    assert unknown.returncode == 2
    assert unknown.stdout == ""
    assert unknown.stderr.count("\n") == 1
    assert "lightening_atention" in unknown.stderr
    assert "did you mean lightning_attention" in unknown.stderr


def test_table_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    assert main([]) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert all(slug in text for slug in catalogue.mechanisms())
    assert max(map(len, text.splitlines())) <= 100


def test_import_leaves_the_devices_alone():
    """Programs choose their devices, and start jax.distributed, after importing."""
    program = (
        "import attention, jax; jax.config.update('jax_num_cpu_devices', 3); "
        "assert len(jax.devices()) == 3"
    )
    environment = {n: x for n, x in os.environ.items() if n != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_markdown_table():
    lines = catalogue.markdown_table().split("\n")
    assert len(lines) == 2 + len(RECORDS)
    assert len({line.count("|") for line in lines}) == 1
    for line, record in zip(lines[2:], RECORDS, strict=True):
        assert line.startswith(f"| `{record.slug}` | {record.title} ({record.year}) |")


def test_unknown_mechanism():
    with pytest.raises(ValueError, match=r"'softmax_atention'.*did you mean softmax_attention"):
        catalogue.get("softmax_atention")
    with pytest.raises(ValueError, match=r"known: .*lightning_attention"):
        catalogue.get("x")


def some_mechanism():
    """Does nothing."""


def some_mechanism_step():
    """Does nothing."""


def init_some_mechanism_state():
    """Does nothing."""


def init_some_mechanism():
    """Does nothing."""


def some_arguments(rng, batch, tokens, dtype):
    """Returns an array that some mechanism does not take."""
    return {"x": rng.standard_normal((batch, tokens, 1)).astype(dtype)}


VALID = dict(
    slug="some_mechanism",
    title="A Paper",
    year=2024,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T)",
    memory="O(T)",
    kernel=None,
    has_weights=False,
    function=some_mechanism,
)


@pytest.mark.parametrize(
    "wrong, error, message",
    (
        (dict(slug="Some-Mechanism"), ValueError, "slug: 'Some-Mechanism'"),
        (dict(title=""), ValueError, "title"),
        (dict(year="2024"), ValueError, "year: '2024'"),
        (dict(year=24), ValueError, "year: 24"),
        (dict(family="convolution"), ValueError, "family: 'convolution'"),
        (dict(patterns={"self causal"}), TypeError, "patterns: .*frozenset"),
        (dict(patterns=frozenset()), ValueError, "patterns"),
        (dict(patterns=frozenset({"causal"})), ValueError, "patterns: 'causal'"),
        (dict(time="linear"), ValueError, "time: 'linear'"),
        (dict(memory="T"), ValueError, "memory: 'T'"),
        (dict(kernel="triton"), ValueError, "kernel: 'triton'"),
        (dict(has_weights=None), TypeError, "has_weights"),
        (dict(one_query=1), TypeError, "one_query: 1"),
        (dict(selects_ahead=None), TypeError, "selects_ahead: None"),
        (dict(small={"size": 3}), ValueError, "small: 'size' is not an option"),
        (dict(function=None), TypeError, "function: None"),
        (dict(function=some_mechanism_step), ValueError, "function: .*must be named"),
        (dict(arguments="x"), TypeError, "arguments: 'x' is not a function"),
        (
            dict(arguments=some_arguments),
            ValueError,
            r"arguments: \('x',\) must be those of a call",
        ),
        (dict(step=some_mechanism_step), ValueError, "step and init_state"),
        (
            dict(step=some_mechanism, init_state=init_some_mechanism_state),
            ValueError,
            "step: .*must be named 'some_mechanism_step'",
        ),
        (dict(implementations=("xla", "xla")), ValueError, "implementations: .*unique"),
        (dict(implementations=("cudnn",)), ValueError, "implementations: 'cudnn'"),
        (dict(extras=("slopes",)), TypeError, "extras: 'slopes'"),
    ),
)
def test_wrong_records(wrong, error, message):
    Mechanism(**VALID)
    with pytest.raises(error, match=message):
        Mechanism(**(VALID | wrong))


def test_record_with_everything():
    record = Mechanism(
        **VALID | dict(has_weights=True),
        step=some_mechanism_step,
        init_state=init_some_mechanism_state,
        extras=(run_examples,),
    )
    assert list(record.exports) == [
        "some_mechanism",
        "some_mechanism_step",
        "init_some_mechanism_state",
        "init_some_mechanism",
        "run_examples",
    ]
    assert record.init is init_some_mechanism
    assert catalogue.row(record)[-2:] == ("yes", "yes")


THINGS = type("Thing", (), {}), type("Thing", (), {})


def test_collection_of_wrong_records(monkeypatch):
    record = Mechanism(**VALID)
    assert list(catalogue.collect([record])) == ["some_mechanism"]
    with pytest.raises(ValueError, match="'some_mechanism' is declared twice"):
        catalogue.collect([record, record])
    with pytest.raises(TypeError, match="must be a Mechanism"):
        catalogue.collect([VALID])
    other = dataclasses.replace(record, function=softmax_attention, slug="softmax_attention")
    sharing, thief = (dataclasses.replace(record, extras=(member,)) for member in THINGS)
    collected = catalogue.collect([dataclasses.replace(other, extras=THINGS[:1]), sharing])
    assert list(collected) == ["softmax_attention", "some_mechanism"]
    with pytest.raises(ValueError, match="'Thing' is also, differently, in softmax_attention"):
        catalogue.collect([dataclasses.replace(other, extras=THINGS[:1]), thief])

    module = inspect.getmodule(RECORDS[0].function)
    other = next(family for family in catalogue.FAMILIES if family != RECORDS[0].family)
    misplaced = dataclasses.replace(RECORDS[0], family=other)
    monkeypatch.setattr(module, "RECORD", misplaced)
    with pytest.raises(ValueError, match=f"family: '{other}', but its module lies in"):
        catalogue.discover()
