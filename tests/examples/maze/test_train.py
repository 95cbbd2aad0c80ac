import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maze.command import UserError
from maze.levels import observe, policy_input
from maze.paths import MOVES, Direction
from maze.policy.network import ACTIONS, NO_MOVE, load_policy, new_policy
from maze.states import FREE, read_mazes, write_mazes
from maze.train import main
from maze.training import imitation, ppo, trainer
from maze.training.imitation import Imitation, direction_log_probabilities
from maze.training.ppo import PPO, Experience, advantages, ppo_losses
from maze.training.trainer import CHECKPOINT, FACTS, KEPT, LOG, WEIGHTS, Trainer, Update
from maze.training.training_data import (
    CHUNK,
    NO_DIRECTION,
    Chunks,
    TrainingMazes,
    batches,
    example_mazes,
    fresh_levels,
    labeled,
    sampled,
)

SCRIPT = Path(imitation.__file__).parents[1] / "train.py"
CPU = torch.device("cpu")
FIRST_ACTIONS = np.array([ACTIONS[move][0] for move in Direction])


def settings(**changed):
    given = dict(
        algorithm="imitation",
        width=1,
        start=None,
        seed=0,
        large=0.0,
        observations=1000,
        batch=16,
        rate=1e-3,
        bfloat16=False,
        auxiliary="field,cell",
        dagger=0.0,
        environments=None,
    )
    return Namespace(**{**given, **changed})


def untrained(width=1):
    torch.manual_seed(0)
    return new_policy(width)


def weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()])


@pytest.fixture(scope="module")
def levels():
    return fresh_levels((0, 0, 0))


@pytest.fixture(scope="module")
def mazes(levels):
    return example_mazes(levels, np.random.default_rng(0))


@pytest.fixture(scope="module")
def chunk():
    return Chunks(0)[0]


def searched(maze):
    """Distances to the cheese of one maze, by cell, found one square after the other."""
    (cheese,) = map(tuple, maze.cheese.tolist())
    found, front = {cheese: 0}, deque([cheese])
    while front:
        cell = front.popleft()
        for move in MOVES.tolist():
            near = (cell[0] + move[0], cell[1] + move[1])
            inside = min(near) >= 0 and max(near) < maze.size[0]
            if inside and near not in found and maze.free[0][near]:
                found[near] = found[cell] + 1
                front.append(near)
    return found


def test_labels_are_those_of_a_search_square_by_square(mazes):
    rows = np.arange(0, len(mazes), 23)
    examples = labeled(np.zeros((len(rows), 64, 64, 3), np.uint8), mazes[rows])
    for index, row in enumerate(rows):
        maze = mazes[[row]]
        found, margin = searched(maze), (25 - maze.size[0]) // 2
        field = np.full((25, 25), NO_DIRECTION)
        for cell, distance in found.items():
            for direction, move in enumerate(MOVES):
                if found.get((cell[0] + move[0], cell[1] + move[1])) == distance - 1:
                    field[24 - margin - cell[0], margin + cell[1]] = direction
        mouse = tuple(maze.mouse[0].tolist())
        assert (examples.field[index] == field).all()
        assert examples.distance[index] == found[mouse]
        assert examples.cell[index] == (24 - margin - mouse[0]) * 25 + margin + mouse[1]
        assert examples.step[index] == field.flat[examples.cell[index]]


def test_who_follows_the_labels_finds_the_cheese_in_procgen_after_that_many_steps():
    walks = TrainingMazes(8, seed=0)
    found = 0
    for _ in range(60):
        examples = walks.examples()
        reward, ended = walks.step(FIRST_ACTIONS[examples.step])
        assert ((reward == 10) == (examples.distance == 1)).all() and (ended == (reward == 10)).all()
        assert (walks.examples().distance == examples.distance - 1)[~ended].all()
        found += ended.sum()
    assert found > 10


def test_the_cheese_is_in_the_top_right_5x5_and_never_at_the_start(mazes):
    walks = TrainingMazes(8, seed=1, patience=2)
    acted_in = []
    for _ in range(9):
        acted_in.append(walks.mazes())
        walks.step([NO_MOVE] * 8)
    assert len({each.free[0].tobytes() for each in acted_in}) == 3
    for each in [mazes, *acted_in]:
        assert (each.cheese >= each.size[:, None] - 5).all()
        assert each.cheese.any(axis=1).all()


def test_every_level_has_two_cheese_squares_and_twelve_mouse_squares_half_on_the_path(mazes):
    assert len(mazes) == CHUNK == 64 * 2 * 6
    on_path = []
    for row in range(0, CHUNK, 7):
        found = searched(mazes[[row]])
        start = mazes[[row]].moved(mouse=(0, 0))
        cell, path = (0, 0), {(0, 0)}
        while found[cell]:
            cell = next(
                near for move in MOVES if found.get(near := (cell[0] + move[0], cell[1] + move[1])) == found[cell] - 1
            )
            path.add(cell)
        assert start.cheese.tolist() == mazes[[row]].cheese.tolist()
        on_path.append(tuple(mazes.mouse[row].tolist()) in path)
    assert all(on_path[: len(on_path) // 2])
    assert not all(on_path[len(on_path) // 2 :])
    assert 0.4 < mazes.facing_right.mean() < 0.6


def test_the_auxiliary_cell_is_where_the_image_shows_the_mouse(levels):
    small = [level for level in levels if read_mazes([level]).size[0] >= 9][0]
    maze = read_mazes([small, small])
    free = np.argwhere(maze.grid[0] == FREE)
    maze = maze.moved(mouse=np.stack([free[1], free[-1]]))
    frames = observe(write_mazes(maze, small))
    rows, cols = np.nonzero((frames[0] != frames[1]).any(axis=2))
    cells = np.stack(np.divmod(labeled(frames, maze).cell, 25), axis=1)
    away = np.abs((np.stack([rows, cols], axis=1)[:, None] + 0.5) / 2.56 - 0.5 - cells)
    assert len(rows) > 0 and (away.max(axis=2).min(axis=1) < 1.5).all()


def test_a_chunk_shows_what_it_is_labeled_with(chunk, levels):
    rng = np.random.default_rng((0, 0, 0, 1))
    mazes = example_mazes(levels, rng)
    order = rng.permutation(CHUNK)[:64]
    expected = labeled(observe([write_mazes(mazes[[row]], levels[row % 64])[0] for row in order]), mazes[order])
    for name, part in vars(expected).items():
        np.testing.assert_array_equal(getattr(chunk, name)[:64], part)


def test_the_stream_is_the_same_for_any_number_of_workers_and_from_any_place():
    here = list(islice(batches(Chunks(0), 500), 4))
    workers = list(islice(batches(Chunks(0), 500, workers=1), 4))
    later = list(islice(batches(Chunks(0), 500, first=1000), 2))
    assert all(len(batch) == 500 for batch in here)
    for batch, other in [*zip(here, workers, strict=True), *zip(here[2:], later, strict=True)]:
        for name, part in vars(batch).items():
            np.testing.assert_array_equal(part, getattr(other, name))


def test_large_draws_sides_in_proportion():
    plain, large = (
        np.concatenate([read_mazes(fresh_levels((0, number), power)).size for number in range(4)]) for power in (0, 1)
    )
    assert abs(plain.mean() - 14) < 1.5
    assert abs(large.mean() - 17.4) < 1.5


def test_a_level_is_given_up_when_patience_ends():
    walks = TrainingMazes(3, seed=0, patience=4)
    ended = [walks.step([NO_MOVE] * 3)[1].tolist() for _ in range(10)]
    assert [all(each) for each in ended] == [False] * 4 + [True] + [False] * 4 + [True]


def test_mazes_go_on_from_a_state():
    def walked():
        rng = np.random.default_rng(0)
        seen = []
        for _ in range(8):
            seen += [walks.frames(), *walks.step(rng.integers(15, size=5))]
        return seen

    walks = TrainingMazes(5, seed=3, patience=3)
    walks.step([5] * 5)
    state = walks.state()
    first = walked()
    walks = TrainingMazes(5, seed=3, patience=3)
    walks.restore(state)
    for one, other in zip(first, walked(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sampled_actions_have_their_probabilities():
    probabilities = np.tile(np.array([0.1, 0.0, 0.6, 0.3], np.float32), (1000, 1))
    counts = np.bincount(sampled(probabilities, (np.arange(1000) + 0.5) / 1000), minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]
    assert sampled(probabilities[:1], np.array([np.nextafter(1, 0)])).tolist() == [3]


def test_a_trainer_gives_the_policy_its_own_input_in_channels_last(chunk):
    trainer, given = Trainer(untrained(), settings(), device=CPU), []
    trainer.policy.register_forward_pre_hook(lambda policy, inputs: given.extend(inputs))
    trainer.forward(torch.from_numpy(chunk.frames[:4]))
    assert given[0].is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(given[0].numpy(), policy_input(chunk.frames[:4]))


def test_a_directions_probability_is_that_of_its_actions():
    logits = torch.log_softmax(torch.randn(3, 15), dim=1)
    summed = logits.exp()[:, [[0, 1, 2], [3, 3, 3], [5, 5, 5], [6, 7, 8]]].sum(dim=2) / torch.tensor([1, 3, 3, 1])
    torch.testing.assert_close(direction_log_probabilities(logits).exp(), summed)


def test_every_loss_falls_on_a_small_fixed_set(chunk, monkeypatch):
    monkeypatch.setattr(imitation, "batches", lambda *_, **__: repeat(chunk[:12]))
    trainer = Imitation(untrained(), settings(batch=12), device=CPU, workers=0)
    measured = [trainer.update(number, progress=0).measures for number in range(60)]
    for name, share in {"step": 0.5, "cell": 0.9, "field": 0.98, "value": 0.1}.items():
        assert measured[-1][name] < share * measured[0][name], (name, measured[0][name], measured[-1][name])
    assert measured[-1]["right"] > measured[0]["right"]


def test_auxiliary_losses_end_at_70_percent_and_leave_what_was_asked_for(chunk, monkeypatch):
    monkeypatch.setattr(imitation, "batches", lambda *_, **__: repeat(chunk[:4]))
    for auxiliary, parts in [("field,cell", {"field", "cell"}), ("cell", {"cell"}), ("none", set())]:
        trainer = Imitation(untrained(), settings(batch=4, auxiliary=auxiliary), device=CPU, workers=0)
        assert trainer.update(0, 0.69).measures.keys() == {"step", "value", "right"} | parts
        assert trainer.update(1, 0.7).measures.keys() == {"step", "value", "right"}


def test_two_trainings_with_one_seed_are_the_same_for_20_updates():
    trainers = [Imitation(untrained(), settings(batch=8, dagger=0.25), device=CPU, workers=0) for _ in range(2)]
    for number in range(20):
        one, other = (trainer.update(number, number / 20).measures for trainer in trainers)
        assert one == other
    assert torch.equal(*map(weights, trainers))


def test_walks_start_with_the_expert_and_go_on_with_the_policy():
    trainer = Imitation(untrained(), settings(batch=8, dagger=0.5, bfloat16=True), device=CPU, workers=0)
    before = trainer.mazes.examples()
    trainer.update(0, progress=0)
    after = trainer.mazes.examples()
    assert ((after.distance == before.distance - 1) | (before.distance == 1)).all()
    for number in range(1, 12):
        trainer.update(number, progress=0.5)
    assert (trainer.mazes.examples().distance >= after.distance - 11).all()
    assert (trainer.mazes.examples().distance > after.distance - 11).any()


def test_width_4_is_trained_by_the_command(tmp_path):
    given = ["--width", "4", "--observations", "16", "--batch", "8", "--bfloat16", "--workers", "0"]
    assert main([*given, "--out", str(tmp_path)]) == 0
    policy, facts = load_policy(tmp_path / WEIGHTS)
    assert facts["width"] == 4 and facts["parameters"] == 3_653_136
    start = torch.cat([weight.detach().flatten() for weight in untrained(4).parameters()])
    assert (torch.cat([weight.detach().flatten() for weight in policy.parameters()]) != start).any()


def test_advantages_are_the_sums_of_discounted_surprises():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 12, 3)).astype(np.float32)
    ended, after = rng.random((12, 3)) < 0.2, rng.normal(size=3).astype(np.float32)
    expected = np.zeros((12, 3))
    for maze in range(3):
        for step in range(12):
            for later in range(step, 12):
                following = after[maze] if later == 11 else values[later + 1, maze]
                surprise = rewards[later, maze] - values[later, maze]
                surprise += 0 if ended[later, maze] else 0.9 * following
                expected[step, maze] += (0.9 * 0.8) ** (later - step) * surprise
                if ended[later, maze]:
                    break
    experience = Experience(None, None, None, values, rewards, ended, after)
    np.testing.assert_allclose(advantages(experience, 0.9, 0.8), expected, rtol=1e-4, atol=1e-5)


def test_the_policy_loss_is_clipped_where_the_ratio_left_its_range_for_the_better():
    logits = torch.log_softmax(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), dim=1)
    actions, old = torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5, 0.5]).log()
    losses = ppo_losses(logits, torch.zeros(3), actions, old, torch.tensor([1.0, -1.0, 0.0]), torch.ones(3))
    ratio = np.exp(logits.numpy()[[0, 1, 2], [0, 0, 1]]) / 0.5
    gain = np.array([1.2 * 1, 0.8 * -1, 0.0])
    assert ratio[0] > 1.2 and ratio[1] < 0.8
    np.testing.assert_allclose(losses["policy"], -gain.mean(), rtol=1e-5)
    assert losses["value"] == 1 and losses["clipped"] == pytest.approx(2 / 3)


def test_ppo_goes_on_from_its_state_as_if_it_had_not_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "STEPS", 6)
    chosen = settings(algorithm="ppo", environments=4, batch=12, auxiliary=None, dagger=None)
    through = PPO(untrained(), chosen, device=CPU)
    first = through.update(0, 0.0)
    state, held = through.state(), {name: weight.clone() for name, weight in through.policy.state_dict().items()}
    torch.save(state, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    through.update(1, 0.5)
    resumed = PPO(untrained(), chosen, device=CPU)
    resumed.policy.load_state_dict(held)
    resumed.restore(state)
    resumed.update(1, 0.5)
    assert first.observations == 24
    assert torch.equal(*map(weights, (through, resumed)))


RUN = ["--observations", "560", "--batch", "8", "--dagger", "0.25", "--workers", "0"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main([*RUN, "--out", str(folder)]) == 0
    return folder


def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(uninterrupted, tmp_path):
    program = (
        "from maze import train; from maze.training import trainer;"
        f"trainer.SAVE_SECONDS = 0; train.main({[*RUN, '--out', str(tmp_path)]})"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=SCRIPT.parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (tmp_path / CHECKPOINT).exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / FACTS).exists()
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert (tmp_path / WEIGHTS).read_bytes() == (uninterrupted / WEIGHTS).read_bytes()
    updates = [json.loads(line)["updates"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert updates == sorted(set(updates)) and updates[-1] == 70


def test_a_finished_run_leaves_a_policy_and_its_facts(uninterrupted):
    facts = json.loads((uninterrupted / FACTS).read_text())
    policy, known = load_policy(uninterrupted / WEIGHTS)
    assert facts["sha256"] == known["sha256"] == hashlib.sha256((uninterrupted / WEIGHTS).read_bytes()).hexdigest()
    assert facts["last"]["observations"] == facts["settings"]["observations"] == 560
    assert {"step", "right", "right_walked", "waiting_for_data", "observations_per_second"} <= facts["last"].keys()
    from_checkpoint, _ = load_policy(uninterrupted / CHECKPOINT)
    for one, other in zip(policy.parameters(), from_checkpoint.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_run_that_is_asked_for_again_keeps_its_policy_and_its_facts(uninterrupted):
    before = {name: (uninterrupted / name).stat().st_mtime_ns for name in (WEIGHTS, FACTS, CHECKPOINT)}
    assert main([*RUN, "--out", str(uninterrupted)]) == 0
    assert {name: (uninterrupted / name).stat().st_mtime_ns for name in before} == before


def test_ppo_starts_from_weights_and_leaves_others(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "STEPS", 4)
    given = ["--algorithm", "ppo", "--start", str(uninterrupted / WEIGHTS), "--environments", "4", "--batch", "8"]
    assert main([*given, "--observations", "32", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / FACTS).read_text())
    assert facts["settings"]["start"] == load_policy(uninterrupted / WEIGHTS)[1]["sha256"]
    assert facts["last"]["updates"] == 2 and 0 < facts["last"]["waiting_for_data"] < 1
    assert (tmp_path / WEIGHTS).read_bytes() != (uninterrupted / WEIGHTS).read_bytes()


def test_a_run_with_other_settings_is_refused(uninterrupted, capsys):
    assert main([*RUN, "--out", str(uninterrupted), "--seed", "1", "--rate", "0.1"]) == 2
    assert capsys.readouterr().err == (
        f"error: '{uninterrupted}' contains a run with other settings: rate was 0.001 and is 0.1, seed was 0 and is 1. "
        "Name another folder with --out, or delete this folder to start over.\n"
    )


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(UserError) as error:
        Counting().train(tmp_path)
    assert str(error.value) == (
        f"'{tmp_path / CHECKPOINT}' is damaged or not a checkpoint. To start over, delete this file."
    )


def test_a_run_from_before_budgets_in_minutes_were_removed_is_refused_or_resumed(tmp_path):
    for minutes, budget in ((6.0, None), (None, 1000)):
        assert Counting().train(tmp_path)
        checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
        checkpoint["settings"] |= {"minutes": minutes, "observations": budget}
        torch.save(checkpoint, tmp_path / CHECKPOINT)
        if minutes is None:
            resumed = Counting()
            assert resumed.train(tmp_path) and resumed.numbers == []
        else:
            with pytest.raises(UserError, match="minutes was 6.0 and is None, observations was None and is 1000"):
                Counting().train(tmp_path)
            (tmp_path / CHECKPOINT).unlink()


class Counting(Trainer):
    """A trainer that counts, and in its fifth update does something else as well."""

    def __init__(self, fifth=lambda: None, measure=1.0):
        super().__init__(nn.Sequential(nn.Linear(1, 1)), settings(), device=CPU)
        self.fifth, self.measure, self.numbers = fifth, measure, []

    def update(self, number, progress):
        self.numbers.append(number)
        if number == 4:
            self.fifth()
        return Update(100, 0.0, {"loss": torch.tensor(self.measure)})

    def state(self):
        return {}

    def restore(self, state):
        pass


def test_ctrl_c_ends_after_the_update_with_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    stopping = Counting(fifth=lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    assert not stopping.train(tmp_path)
    assert stopping.numbers == [0, 1, 2, 3, 4]
    assert signal.getsignal(signal.SIGINT) is handler
    going_on = Counting()
    assert going_on.train(tmp_path)
    assert going_on.numbers == [5, 6, 7, 8, 9]


def test_policies_along_the_way_are_kept_every_so_many_minutes(tmp_path, monkeypatch):
    clock = iter(np.arange(0, 10_000, 10.0).tolist())  # ten seconds pass between two looks
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))
    assert Counting().train(tmp_path, keep_every=0.5)
    kept = sorted(int(file.stem) for file in (tmp_path / KEPT).iterdir())
    assert kept == [300, 600, 900]  # an update takes ten seconds and has 100 observations
    assert (tmp_path / KEPT / "900.safetensors").read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_no_policies_are_kept_unless_asked_for(uninterrupted):
    assert not (uninterrupted / KEPT).exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Counting(fifth=twice).train(tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    with pytest.raises(UserError) as error:
        Counting(measure=float("nan")).train(tmp_path)
    assert str(error.value) == (
        "loss became infinite or NaN by update 1. The last checkpoint is from before that update; a lower --rate may "
        "help."
    )
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dagger", "0.001"], "--dagger 0.001 of --batch 128 is less than one observation."),
        (["--algorithm", "ppo", "--dagger", "0.5"], "--dagger only applies to --algorithm imitation."),
        (["--environments", "8"], "--environments only applies to --algorithm ppo."),
        (["--start", "nowhere.pth"], "The weights 'nowhere.pth' cannot be read: No such file or directory."),
    ],
)
def test_wrong_arguments_give_one_line(given, message, capsys, tmp_path):
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_weights_of_another_width_are_refused(uninterrupted, capsys, tmp_path):
    assert main(["--start", str(uninterrupted / WEIGHTS), "--width", "4", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --width is 4, but the weights in --start have width 1.\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--seed=-1", "--seed: must be between 0 and 2147483647; got -1"),
        ("--width=0", "--width: must be between 1 and 16; got 0"),
        ("--dagger=1", "--dagger: must be between 0 and 0.9; got 1"),
        ("--rate=nan", "--rate: must be between 1e-07 and 1; got nan"),
        ("--batch=many", "--batch: invalid int value: 'many'"),
    ],
)
def test_a_number_out_of_range_is_an_error_of_the_command_line(given, message, capsys):
    with pytest.raises(SystemExit):
        main([given])
    assert capsys.readouterr().err.endswith(f"error: argument {message}\n")


@pytest.mark.parametrize("removed", ["--minutes=2", "--save-minutes=1", "--no-resume", "--device=cpu"])
def test_a_removed_option_is_an_error_of_the_command_line(removed, capsys):
    with pytest.raises(SystemExit):
        main([removed])
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {removed}\n")


def test_help_teaches_with_examples():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--algorithm ppo --start" in done.stdout and done.stderr == ""
