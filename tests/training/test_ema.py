import copy
import io

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnssl.training.ema import EMATeacher, ema_decay


def plain_unet():
    torch.manual_seed(0)
    return PlainConvUNet(
        1, 2, (4, 8), nn.Conv2d, 3, (1, 2), 1, 2, 1, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    )  # fmt: skip


def wander(network, generator):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def closed_form(history, decay):
    """Unroll the recursion: the weight of student j is (1 - alpha_j) times all later alphas."""
    total = torch.zeros_like(history[0], dtype=torch.float64)
    for j, student in enumerate(history):
        weight = 1 - min(1 - 1 / (j + 1), decay)
        for later in range(j + 1, len(history)):
            weight *= min(1 - 1 / (later + 1), decay)
        total += weight * student.double()
    return total


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.999])
def test_teacher_equals_the_closed_form_although_names_repeat(decay):
    student = plain_unet()
    assert len(student.state_dict()) > len(list(student.parameters()))  # the decoder holds the encoder
    teacher, generator = EMATeacher(student, decay), torch.Generator().manual_seed(1)
    history = []
    for step in range(6):
        wander(student, generator)
        teacher.update(student, step)
        history.append([p.detach().clone() for p in student.parameters()])
    for i, parameter in enumerate(teacher.module.parameters()):
        expected = closed_form([weights[i] for weights in history], decay).float()
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def test_early_steps_average_plainly():
    assert [ema_decay(step, 0.99) for step in (0, 1, 3)] == [0, 0.5, 0.75]
    assert ema_decay(10_000, 0.99) == 0.99
    student = nn.Linear(1, 1, bias=False)
    teacher = EMATeacher(student, 0.99)
    for step, value in enumerate([2.0, 4.0, 9.0]):
        nn.init.constant_(student.weight, value)
        teacher.update(student, step)
    assert float(teacher.module.weight) == pytest.approx(5.0)


def test_teacher_is_apart_from_the_student():
    student = plain_unet().train()
    teacher = EMATeacher(student)
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert student.training
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (teacher.module, student))
    assert not ours & theirs
    before = [p.clone() for p in student.parameters()]
    wander(teacher.module, torch.Generator().manual_seed(2))
    teacher.update(student, 50)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_buffers_are_copied():
    student = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2))
    teacher = EMATeacher(student)
    student.train()(torch.randn(4, 1, 5) + 3)
    teacher.update(student, 1000)
    for ours, theirs in zip(teacher.module.buffers(), student.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert int(teacher.module[1].num_batches_tracked) == 1


def test_compiled_form_of_the_student_is_accepted():
    student = plain_unet()
    teacher = EMATeacher(student, 0.5)
    wander(student, torch.Generator().manual_seed(3))
    teacher.update(torch.compile(student, backend="eager"), 0)
    for ours, theirs in zip(teacher.module.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_resumed_teacher_continues_exactly():
    student, generator = plain_unet(), torch.Generator().manual_seed(4)
    teacher = EMATeacher(student, 0.9)
    for step in range(3):
        wander(student, generator)
        teacher.update(student, step)
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    resumed = EMATeacher(copy.deepcopy(student), 0.9)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    wander(student, generator)
    for each in (teacher, resumed):
        each.update(student, 3)
    for a, b in zip(teacher.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_state_reads_into_a_bare_network():
    student = plain_unet()
    teacher = EMATeacher(student)
    other = plain_unet()
    wander(other, torch.Generator().manual_seed(5))
    other.load_state_dict(teacher.state_dict())
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(other(x)[0], student(x)[0])


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="decay"):
        EMATeacher(nn.Linear(1, 1), 1.0)
    teacher = EMATeacher(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="step"):
        teacher.update(nn.Linear(1, 1), -1)
    with pytest.raises(ValueError, match="match"):
        teacher.update(nn.Linear(1, 1, bias=False), 0)
