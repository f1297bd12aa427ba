"""Colors of classes: tables, their distances, and the lookup."""

import itertools
import math

import pytest
import torch

from nnssl.training.coloring import SCHEMES, color_table, colorize

COUNTS = [2, 3, 4, 8, 20]


def closest(table) -> float:
    return min(math.dist(a, b) for a, b in itertools.combinations(table.tolist(), 2))


@pytest.mark.parametrize("classes", COUNTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_colors_differ_lie_in_the_cube_and_background_is_black(scheme, classes):
    table = color_table(classes, scheme)
    assert table.shape == (classes, {"onehot": classes - 1, "gray": 1}.get(scheme, 3))
    assert table.dtype == torch.float32
    assert len({tuple(row) for row in table.tolist()}) == classes
    assert table[0].abs().max() == 0
    assert 0 <= table.min() <= table.max() <= 1
    assert torch.equal(table, color_table(classes, scheme))


def test_published_colors():
    """Section 2.1 of the fact sheet: white for one foreground class, otherwise red, green, blue."""
    red, green, blue = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert color_table(2)[1:].tolist() == [[1.0, 1.0, 1.0]]
    assert color_table(3)[1:].tolist() == [red, green]
    assert color_table(4)[1:].tolist() == [red, green, blue]
    corners = set(itertools.product((0.0, 1.0), repeat=3))
    assert {tuple(row) for row in color_table(8).tolist()} == corners


@pytest.mark.parametrize("classes", range(2, 21))
def test_distant_colors_are_no_closer_than_the_published_ones(classes):
    assert closest(color_table(classes, "distant")) >= closest(color_table(classes)) - 1e-6


def test_four_distant_colors_are_a_regular_tetrahedron():
    """The largest smallest distance of four points in the cube."""
    pairs = itertools.combinations(color_table(4, "distant").tolist(), 2)
    assert [math.dist(a, b) for a, b in pairs] == pytest.approx([math.sqrt(2)] * 6)


@pytest.mark.parametrize("space", [(5, 6), (3, 4, 5)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_colorize_looks_every_voxel_up(scheme, space):
    table = color_table(5, scheme)
    labels = torch.randint(0, 5, (2, 1, *space), generator=torch.Generator().manual_seed(0))
    colored = colorize(labels, table)
    assert colored.shape == (2, table.shape[1], *space)
    for item, *voxel in itertools.product(range(2), *map(range, space)):
        assert torch.equal(colored[(item, slice(None), *voxel)], table[labels[(item, 0, *voxel)]])


def test_onehot_is_the_foreground_of_one_hot():
    labels = torch.randint(0, 4, (2, 1, 6, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1)[:, 1:].float()
    assert torch.equal(colorize(labels, color_table(4, "onehot")), expected)
    assert torch.equal(colorize(labels, color_table(4)), expected)  # four published colors are the same


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_gray_is_one_channel_of_even_steps(classes):
    assert color_table(classes, "gray")[:, 0].tolist() == pytest.approx([i / (classes - 1) for i in range(classes)])


def test_labels_that_are_no_class_take_the_backgrounds_color():
    labels = torch.tensor([[[-1, 0, 1, 2, 3, 255]]], dtype=torch.int16)
    table = color_table(3)
    expected = torch.stack([table[0], table[0], table[1], table[2], table[0], table[0]], 1)[None]
    assert torch.equal(colorize(labels, table), expected)


def test_misuse_is_refused():
    for wrong in ((1, "published"), (4, "rainbow")):
        with pytest.raises(ValueError, match="two classes or more"):
            color_table(*wrong)
