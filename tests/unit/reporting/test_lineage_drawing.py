import pytest
from rich.console import Console

from molora_fed.population.lineage import Change, Lineage, Measured, Measurement, Newborn
from molora_fed.reporting.lineage import build_lineage_tree, draw_lineage


def bear(id, slot, operator, *parents, generation=0, before=None, domain="up"):
    return Newborn(
        slot=slot,
        domain=domain,
        id=id,
        operator=operator,
        parents=parents,
        generation=generation,
        seed=7,
        fitness_before=before,
    )


def measure(generation, **values):
    slots = tuple(Measured(id=i, value=v, error=0.1, by_domain=(v,)) for i, v in values.items())
    return Measurement(generation=generation, scope="global", domains=("up",), slots=slots)


def change(generation, births, deaths=(), kept=True):
    return Change(generation=generation, kept=kept, births=births, deaths=deaths)


@pytest.fixture
def lineage():
    start = (
        bear("a", 0, "admitted", "legal-07"),
        bear("b", 1, "clone", "a", domain=None),
        bear("c", 2, "fresh"),
    )
    return Lineage(
        (
            change(0, start),
            measure(1, a=0.2, b=0.1, c=-0.1),
            change(1, (bear("d", 2, "crossover", "a", "b", generation=1, before=-0.1),), ("c",)),
            measure(2, a=0.2, b=0.1, d=0.15),
            change(
                2,
                (bear("e", 1, "inheritance", "d", generation=2, before=0.1),),
                ("b",),
                kept=False,
            ),
        )
    )


def show(lineage):
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(build_lineage_tree(lineage))
    return capture.get()


def test_the_tree_says_who_came_from_whom(lineage):
    assert show(lineage).splitlines() == [
        "5 adapters, generations 0 to 2",
        "├── a  slot 0, up: admitted legal-07, seed 7, fitness +0.2000 nats",
        "│   ├── b  slot 1, no domain: clone, seed 7, fitness +0.1000 nats",
        "│   └── d  slot 2, up: crossover with b, seed 7, fitness -0.1000 → +0.1500 nats",
        "│       └── e  slot 1, up: inheritance, seed 7, fitness +0.1000 → ? nats, not kept",
        "└── c  slot 2, up: fresh, seed 7, fitness -0.1000 nats, dies in generation 1",
    ]


def test_names_cannot_steer_a_terminal():
    born = (bear("a\x1b[2J", 0, "admitted", "x\r\x07", domain="[bold]up"),)
    shown = show(Lineage((change(0, born),)))
    assert "\x1b" not in shown and "\r" not in shown and "[bold]up" in shown


def test_the_figure_is_png_and_the_same_every_time(lineage):
    first = draw_lineage(lineage)
    assert first.startswith(b"\x89PNG") and draw_lineage(lineage) == first
    assert draw_lineage(Lineage((change(0, (bear("a", 0, "fresh"),)),))).startswith(b"\x89PNG")


def test_a_long_line_of_descent_is_drawn():
    born = [change(0, (bear("g0", 0, "fresh"),))]
    born += [
        change(n, (bear(f"g{n}", 0, "inheritance", f"g{n - 1}", generation=n),), (f"g{n - 1}",))
        for n in range(1, 60)
    ]
    lines = show(Lineage(tuple(born))).splitlines()
    assert len(lines) == 61
    assert lines[13] == "├── g12  slot 0, up: inheritance of g11, seed 7, dies in generation 13"
    assert lines[-1].endswith("g59  slot 0, up: inheritance, seed 7")
