import importlib.util

import numpy as np
import pytest
import torch
import trimesh

from anytok.modalities import Shape, distance
from anytok.modalities.inside import Grid, inside, winding
from anytok.modalities.measure import chamfer, volume_iou
from anytok.modalities.watertight import make_watertight, sdf
from tests.modalities.conftest import cube

REMESHING = ["voxels"] + (["mesh2sdf"] if importlib.util.find_spec("mesh2sdf") else [])


def shape(mesh: trimesh.Trimesh) -> Shape:
    return Shape.from_numpy(mesh.vertices, mesh.faces)


def sphere(divisions: int = 3) -> Shape:
    return shape(trimesh.creation.icosphere(divisions))


def points(count: int, reach: float = 1.2, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, generator=rng) * 2 - 1) * reach


def box_distance(p: torch.Tensor, half: list[float]) -> torch.Tensor:
    q = p.double().abs() - torch.tensor(half, dtype=torch.float64)
    return q.clamp(min=0).norm(dim=1) + q.amax(dim=1).clamp(max=0)


@pytest.mark.parametrize("half", [[0.8, 0.5, 0.3], [0.8, 0.5, 0.004]])
def test_distance_to_a_box_is_exact(half):
    box = shape(trimesh.creation.box([2 * side for side in half]))
    p = points(6000)
    found, expected = sdf(box, p), box_distance(p, half)
    assert (found.distance - expected).abs().max() < 1e-6
    assert torch.equal(found.distance < 0, expected < 0)
    assert torch.allclose(found.gradient.norm(dim=1), torch.ones(6000), atol=1e-5)
    # Walking along the gradient by the distance ends on the surface.
    landed = p - found.gradient * found.distance[:, None]
    assert box_distance(landed, half).abs().max() < 1e-5


def test_distance_near_a_fine_surface_and_on_it():
    ball = sphere(4)
    on = ball.sample(2000)
    found = sdf(ball, on.vertices)
    assert found.distance.abs().max() < 1e-6
    assert (found.gradient * on.normals).sum(dim=1).min() > 0.99
    off = on.vertices + 0.01 * on.normals
    assert (sdf(ball, off).distance - 0.01).abs().max() < 2e-4


def test_sign_agrees_with_the_winding_number_on_a_crooked_mesh():
    rng = torch.Generator().manual_seed(1)
    ball = sphere(2)
    spiky = Shape(
        ball.vertices * (0.3 + 0.7 * torch.rand(len(ball.vertices), 1, generator=rng)), ball.faces
    )
    p = points(300)
    corners = spiky.triangles().double()[None] - p.double()[:, None, None]  # [N, F, 3, 3]
    a, b, c = corners.unbind(dim=2)
    x, y, z = (v.norm(dim=-1) for v in (a, b, c))
    top = (a * torch.linalg.cross(b, c)).sum(-1)
    bottom = x * y * z + (a * b).sum(-1) * z + (b * c).sum(-1) * x + (c * a).sum(-1) * y
    winding = torch.atan2(top, bottom).sum(dim=1) / (2 * torch.pi)
    assert torch.equal(sdf(spiky, p).distance < 0, winding > 0.5)
    grid = Grid.around([spiky], 20)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in grid.counts))
    centres = torch.tensor(grid.origin) + grid.step * cells
    assert torch.equal(inside(spiky, grid).flatten(), sdf(spiky, centres).distance < 0)


@pytest.mark.parametrize("few", [0, 10**6])
def test_many_triangles_and_few_agree(few, monkeypatch):
    monkeypatch.setattr(distance, "_FEW", few)
    box = shape(trimesh.creation.box([1.6, 1.0, 0.6]))
    ball, p = sphere(2), points(1500)
    assert (sdf(box, p).distance - box_distance(p, [0.8, 0.5, 0.3])).abs().max() < 1e-6
    corners = ball.triangles().double()
    exact = distance._squared_distances(corners.numpy(), p.double().numpy()).min(1)
    assert np.abs(sdf(ball, p).distance.abs().numpy() - exact**0.5).max() < 1e-6
    # the middle is as far from every piece: the most candidates there can be
    middle = sdf(ball, torch.zeros(1, 3))
    assert float(middle.distance) == pytest.approx(
        -corners.mean(1).norm(dim=1).min().item(), abs=2e-3
    )


def test_parts_that_overlap_are_inside():
    one, other = shape(trimesh.creation.box([1, 1, 1])), shape(trimesh.creation.box([1, 1, 1]))
    other = other.transformed(torch.tensor([0.4, 0.1, 0.2]), 1.0)
    both = Shape(
        torch.cat([one.vertices, other.vertices]),
        torch.cat([one.faces, other.faces + len(one.vertices)]),
    )
    p = points(3000)
    wanted = (p.abs() < 0.5).all(1) | ((p - torch.tensor([0.4, 0.1, 0.2])).abs() < 0.5).all(1)
    found = sdf(both, p)
    assert torch.equal(found.distance < 0, wanted)
    # inside the other part, the nearest wall of this one points the other way: the direction of its faces is no help
    numbers = winding(both.triangles().double().numpy(), p.double().numpy())
    assert sorted(set(numbers.tolist())) == [0, 1, 2]
    turned = winding(both.triangles().flip(1).double().numpy(), p.double().numpy())
    assert (turned == -numbers).all()


def test_limit_truncates_and_keeps_signs():
    box = shape(trimesh.creation.box([1.6, 1.0, 0.6]))
    p = points(5000)
    expected = box_distance(p, [0.8, 0.5, 0.3])
    found = sdf(box, p, limit=0.05)
    assert (found.distance - expected.clamp(-0.05, 0.05)).abs().max() < 1e-6
    far = expected.abs() > 0.0501
    assert (found.gradient[far] == 0).all()
    assert (sdf(box, p, limit=1e-4).distance.abs() <= 1.001e-4).all()
    with pytest.raises(ValueError, match=r"limit is 0\.0, expected above 0"):
        sdf(box, p, limit=0.0)


def test_lines_through_edges_and_corners_are_counted_once():
    # Grid lines through the diagonals, edges and corners of the cube.
    exact = Grid((0.0, 0.0, 0.25), 0.25, (5, 5, 3))
    found = inside(cube(), exact)
    assert found[1:4, 1:4].all()
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("remeshing", REMESHING)
@pytest.mark.parametrize("kind", ["open", "sheet", "soup", "double"])
def test_anything_becomes_watertight(remeshing, kind):
    rng = torch.Generator().manual_seed(0)
    broken = {
        "open": Shape(sphere().vertices, sphere().faces[40:]),
        "sheet": Shape(cube().vertices, cube().faces[:2]),
        "soup": Shape(torch.rand(40, 3, generator=rng), torch.randint(40, (20, 3), generator=rng)),
        "double": Shape(cube().vertices, torch.cat([cube().faces, cube().faces[:4]])),
    }[kind]
    repaired = make_watertight(broken, resolution=24, remeshing=remeshing)
    assert repaired.method == remeshing
    assert repaired.shape.is_watertight
    assert repaired.shape.volume() > 0
    longest = (broken.bounds[1] - broken.bounds[0]).max().item()
    assert repaired.offset == pytest.approx(longest / 1.6 / 24)
    assert chamfer(repaired.shape, broken) < 2 * repaired.offset + (
        0.3 if kind == "double" else 0.01
    )


def test_closed_soup_is_filled():
    split = Shape(cube().triangles().reshape(-1, 3), torch.arange(36).reshape(12, 3))
    assert not split.is_watertight
    filled = make_watertight(split, resolution=40, remeshing="voxels").shape
    assert volume_iou(filled, cube(), resolution=32) > 0.85


def test_what_can_be_kept_is_kept():
    assert make_watertight(cube()).method == "unchanged"
    inverted = Shape(cube().vertices, cube().faces.flip(1))
    turned = make_watertight(inverted)
    assert (turned.method, turned.offset) == ("turned", 0.0)
    assert turned.shape.volume() == pytest.approx(1)
    faces = cube().faces.clone()
    faces[3:7] = faces[3:7].flip(1)
    mixed = make_watertight(Shape(cube().vertices, faces))
    assert mixed.method == "turned"
    assert torch.equal(mixed.shape.vertices, cube().vertices)
    assert mixed.shape.volume() == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_watertight(cube().sample(5)), "point cloud"),
        (lambda: make_watertight(cube(), resolution=8), "expected 16 … 512"),
        (
            lambda: sdf(Shape(cube().vertices, cube().faces[:5]), torch.zeros(1, 3)),
            "make_watertight",
        ),
        (lambda: sdf(cube(), torch.zeros(1, 2)), r"expected \[N, 3\]"),
        (lambda: sdf(cube(), torch.full((1, 3), torch.nan)), "finite"),
    ],
)
def test_wrong_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_points_are_no_problem():
    assert sdf(cube(), torch.zeros(0, 3)).gradient.shape == (0, 3)
