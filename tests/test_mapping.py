from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import MappingError
from converters.mapping import find_mappings, load_mapping, mappings_folder
from converters.names import Pattern, split
from converters.rows import Drop, Fill, most_specific


def test_compiled(family):
    mapping = family(
        """
strip: [module., backbone./]
target_args: {eps: 1e-5}
rules:
  a.{i}: b.{i+1} | turn | flip
  c:
    - {to: d, when: {source: a.0, target: d.1}}
    - e
ops:
  turn: o i -> i o
drop:
  neck.**: detector
fill:
  "**.count": 0
""",
        head="# A family\ntargets: {resnet18: {depth: 18}, resnet34: }\ndetect: [a, [b, c]]\nleaves: tensorflow\n",
    )
    assert mapping.title == "A family"
    assert mapping.targets == {"resnet18": {"depth": 18}, "resnet34": {}}
    assert mapping.target_args == {"eps": 1e-5}
    assert [[sign.text for sign in one] for one in mapping.detect] == [["a"], ["b", "c"]]
    assert [(row.line, row.text) for row in mapping.rows] == [
        (9, "a.{i}: b.{i+1}"),
        (10, "c: d"),
        (16, "neck.**: detector"),
    ]
    assert mapping.rows[0].ways[0].ops.text == "o i -> i o | flip"
    assert [way.target and way.target.text for way in mapping.rows[1].ways] == ["d.1", None]
    assert [(fill.line, fill.text) for fill in mapping.fill] == [(18, "**.count: 0")]
    assert mapping.stripped("module.backbone.x.weight") == ("x", "weight")
    assert mapping.stripped("backbone/module.weight") == ("module", "weight")
    assert mapping.stripped("module") == ("module",)


def test_arguments_may_be_the_targets_own(family):
    mapping = family("target_args: {bn_eps: $eps, act: relu}\n", head="targets: {a: {eps: 0.1}, b: }\ndetect: [x]\n")
    assert mapping.args_of("a") == {"bn_eps": 0.1, "act": "relu"}
    assert mapping.args_of("b") == {"act": "relu"}


def test_a_layout_may_be_like_another(family):
    own = "leaves: {like: keras, moving_variance: running_var | add 9.9e-4, x: [y | i o -> o i, z]}\n"
    leaves = family("", head=f"targets: none\ndetect: [a]\n{own}refuse: [{{reason: because}}]\n").leaves
    assert leaves["moving_variance"][0].ops.text == "add 9.9e-4" and leaves["gamma"][0].name == "weight"
    assert [(leaf.name, leaf.rank) for leaf in leaves["x"]] == [("y", 2), ("z", None)]


def test_without_targets_there_is_a_reason(family):
    with pytest.raises(MappingError, match="1: without targets a family needs a reason"):
        family("", head="targets: none\ndetect: [a]\nrefuse: [{reason: r, when: {source: b}}]\n")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("rulez: {a: b}", 4, "`rulez` is no key of the mapping language; there are targets, detect, leaves, rules, "),
        ("rules:\n  a: {too: b}", 5, "`rules.a.too` is no key of the mapping language"),
        ("rules:\n  a:\n    - b\n    - {to: b,\n       when: {sauce: c}}", 8, "`rules.a.1.when.sauce` is no key of"),
        ("rules:\n  a: {when: {source: b}}", 5, "`rules.a` lacks `to`"),
        ("rules:\n  a: {to: b, when: {metadata: c}}", 5, "`rules.a.when.metadata` is no key of"),
        ("rules:\n  a: 5", 5, "`rules.a`: input should be a valid string"),
        ("rules:\n  a:", 5, "`rules.a`: input should be a valid string"),
        ("rules:\n  a: []", 5, "`rules.a`: list should have at least 1 item"),
        ("rules:\n  a: [b, 1e-5]", 5, "`rules.a.1`: input should be a valid string"),
        ("rules: [a]", 4, "`rules`: input should be a valid dictionary"),
        ("strip: 5", 4, "`strip`: input should be a valid string"),
        ("drop: {a: }", 4, "`drop.a`: input should be a valid string"),
        ("drop: {a: ''}", 4, "`drop.a`: string should have at least 1 character"),
        ("fill: {a: x}", 4, "`x` is no formula; there are identity, sincos2d"),
        ("fill: {a: {value: x, reason: r}}", 4, "`x` is no formula; there are identity, sincos2d"),
        ("unstack: {a: b}", 4, "`b` needs one capture that is not on the left, for a layer's number"),
        ("unstack:\n  a.{i}: b.{i}.{j}.{k}", 5, "`b.{i}.{j}.{k}` needs one capture that is not on the left"),
        ("unstack: {a: 'b.{i}.{c|d}'}", 4, "`b.{i}.{c|d}` needs one capture"),
        ("unstack: {a: 'b.{'}", 4, "`b.{` has a brace without its partner"),
        ("fill: {a: true}", 4, "`fill.a`: input should be a valid "),
        ("tables:\n  l: {}", 5, "`tables.l`: dictionary should have at least 1 item"),
        ("tables:\n  l: {a: 1, b: c}", 5, "`tables.l.b`: input should be a valid integer"),
        ("rules: {a: b}\nreference: {runner: r, model: {}, outputz: {}}", 5, "`reference.outputz` is no key of"),
        ("rules: {a: b}\nreference: {runner: r, model: {}}", 5, "`reference` lacks `outputs`"),
        # the name language
        ("rules:\n  a.{i: b", 5, "`{i` has a brace without its partner"),
        ("rules:\n  a: b\n  c.{i}: d.{j}", 6, "`d.{j}`: {j} is captured nowhere on the left"),
        ("rules:\n  c.{i}: {to: d, when: {source: e.{j+1}}}", 5, None),
        ("rules:\n  c.{i}: {to: d, when: {source: 'e.{j+1}'}}", 5, "`e.{j+1}`: {j} is captured nowhere on the left"),
        ("rules:\n  c: {to: d, when: {target: 'e.{'}}", 5, "`e.{` has a brace without its partner"),
        ("rules:\n  c.{i}: d.{i.real}", 5, "`{i.real}` is no expression of captures"),
        ("rules:\n  '**.c': d", 5, "`**` stands in drop and fill only"),
        ("rules:\n  c.*: d.*", 5, "`d.*`: a bare `*` has no meaning on the right side"),
        ("rules:\n  '{q|q}': d", 5, "`{q|q}` must name different words"),
        ("rules: {a: b}\ndrop:\n  x.{}: y", 6, "`{}` is no capture"),
        ("rules: {a: b}\nfill:\n  x{: 1", 6, "`x{` has a brace without its partner"),
        ("rules: {a: b}\nstrip: ./", 5, "`` has a segment without text"),
        ("rules: {a: b}\nenumerate:\n  n: b.{s+1}", 6, "`{s+1}` is no capture"),
        ("rules:\n  x{n}.y{s}: b\nenumerate: {n: 'b.{s}'}", 5, "{s} is captured on the left and by `enumerate` too"),
        # the op language
        ("rules:\n  a: b | transpose", 5, "`transpose` is no op; there are cat, chunk, flip, zeros, "),
        ("rules:\n  a: b | i o -> o", 5, "`i o -> o` does not keep its axes: i"),
        ("rules: {a: b}\nops:\n  unused: i o -> o", 6, "`i o -> o` does not keep its axes: i"),
        ("rules: {a: b}\nops:\n  cat: flip", 6, "`cat` is a built-in op; choose another name"),
        ("rules: {a: b}\nops:\n  x: y\n  y: flip", 6, "`y` is no op"),
    ],
)
def test_faults_name_file_and_line(family, text, line, problem):
    with pytest.raises(MappingError) as caught:
        family(text)
    place, _, rest = str(caught.value).partition(": ")
    assert place.endswith(f".yaml:{line}")
    assert rest.startswith(problem or "is no YAML")
    assert "\n" not in rest


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ("targets: {}\ndetect: [a]\nleaves: torch\n", "1: `targets`: dictionary should have at least 1 item"),
        ("targets: some\ndetect: [a]\nleaves: torch\n", "1: `targets`: input should be "),
        ("targets: any\ndetect: []\nleaves: torch\n", "2: `detect`: list should have at least 1 item"),
        ("targets: any\ndetect: [a, []]\nleaves: torch\n", "2: `detect.1`: list should have at least 1 item"),
        ("targets: any\ndetect:\n - a\n - b..c\nleaves: torch\n", "4: `b..c` has a segment without text"),
        ("targets: any\ndetect: [a]\nleaves: fortran\n", "3: leaves.yaml has no layout `fortran`; there are torch, "),
        ("targets: any\ndetect: [a]\nleaves: no\n", "3: `no` has two readings in YAML"),
    ],
)
def test_faults_of_the_head(family, head, problem):
    with pytest.raises(MappingError) as caught:
        family("rules: {a: b}\n", head)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["[a, b]", "just text", "5"])
def test_a_file_that_is_no_table(family, text):
    with pytest.raises(MappingError, match=r"yaml:1: `the file`: input should be a valid dictionary"):
        family(text, head="")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MappingError, match="cannot be read"):
        load_mapping(str(tmp_path / "absent.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(MappingError, match="cannot be read"):
        load_mapping(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize(("name", "cure"), [("swin", "did you mean mmlab/swin"), ("nothing", "there are ")])
def test_unknown_family(name, cure):
    with pytest.raises(MappingError, match=f"there is no family `{name}`; {cure}"):
        load_mapping(name)


def test_an_edited_file_is_read_again(family, tmp_path):
    mapping = family("rules: {a: b}")
    mapping.path.write_text(mapping.path.read_text().replace("a: b", "a: c"))
    assert load_mapping(mapping.name).rows[0].text == "a: c"
    assert load_mapping(mapping.name) is load_mapping(mapping.name)


@pytest.mark.parametrize("name", find_mappings())
def test_every_mapping_that_ships(name):
    mapping = load_mapping(name)
    assert mapping.title and ("->" in mapping.title or not mapping.targets or name.startswith("timm/"))
    assert mapping.path.is_relative_to(mappings_folder())


PATTERNS = st.lists(st.sampled_from(["a", "b", "{i}", "{*}", "*", "a*"]), min_size=1, max_size=3, unique=True)


@given(
    st.lists(PATTERNS.map(".".join), unique=True, min_size=1, max_size=6).flatmap(
        lambda texts: st.tuples(st.just(texts), st.permutations(texts))
    ),
    st.lists(st.sampled_from(["a", "b", "1"]), min_size=1, max_size=4).map(tuple),
)
def test_the_most_specific_row_does_not_depend_on_order(orders, name):
    def winners(texts: list[str]) -> tuple[set[str], object]:
        rows, match = most_specific([Drop(0, Pattern.parse(text), "r") for text in texts], name)
        return {row.pattern.text for row in rows}, match and match.rank

    assert winners(orders[0]) == winners(list(orders[1]))


@pytest.mark.parametrize(
    ("name", "winners"),
    [
        ("norm.weight", ["norm"]),
        ("norm3.weight", ["norm3"]),
        ("norm2.weight", ["norm{k}"]),
        ("stages.0.norm.weight", ["stages.{i}.norm"]),
        ("stages.0.index", ["**.index"]),
        ("stages.0.other", ["stages.{i}"]),
        ("q.weight", ["{q|k}"]),
        ("rest.weight", ["{*}"]),
        ("x.y", ["x.{i|y}", "{x|z}.y"]),
    ],
)
def test_longest_then_most_literal(name, winners):
    texts = [
        "{*}",
        "norm",
        "norm3",
        "norm{k}",
        "stages.{i}",
        "stages.{i}.norm",
        "**.index",
        "{q|k}",
        "x.{i|y}",
        "{x|z}.y",
    ]
    rows, _ = most_specific([Drop(0, Pattern.parse(text), "r") for text in texts], split(name))
    assert [row.pattern.text for row in rows] == winners


def test_nothing_matches():
    assert most_specific([Fill(0, Pattern.parse("a"), 0)], ("b",)) == ([], None)
