"""The maze of the example study: procgen levels as data, and the policy that walks them.

| file | what it holds |
|---|---|
| `command.py` | how a command ends: what the user can mend is one line, and the exit status |
| `requirements.py` | the only imports of procgen and procgen-tools, and what to type when they are missing |
| `states.py` | `Mazes`: a batch of mazes as arrays; read from and written to procgen's state bytes |
| `paths.py` | distances, first steps, paths and decision squares of a batch of mazes |
| `levels.py` | real procgen levels with cheese and mouse where a study wants them; their observations |
| `pairs.py` | contrastive pairs drawn by hand: two mazes that differ by one moved wall, in four rotations |
| `policy.py` | the IMPALA policy from a weights file, and which actions go in which direction |
| `environment.py` | `MazeVectorEnv`: given levels as a gymnasium vector environment |
| `weights/` | the policy that is shipped, with its model card |
| `channels.py` | the sums of a hook point's channels, and the channel that tells a direction best |
| `ablation.py` | the same levels and draws with and without a channel: rollouts kept on disk, counts, intervals |
| `episodes.py` | what a policy did on every level, as arrays |
| `exact.py` | every level as a Markov chain: probabilities without sampling, and walks with a rollout's own draws |
| `tables.py` | the policy's action probabilities in every state, for many interventions at once |
| `effects.py` | what interventions do on many levels: tables some levels at a time, ablations, effects with intervals |
| `ablation_grid.py` | the picture of the ablations |
| `push_ablation.py` | the channels that push for a goal ablated, beside matched sets of others |
| `off_distribution.py` | how far interventions lead from activations that occur |
| `steering.py` | steering vectors of single mazes, and their controls |
| `evaluation.py` | how well a policy does and where it goes, by size and place of the cheese, for `evaluate.py` |
| `paired_evaluation.py` | two policies on the same levels, for `evaluate.py --against` |
| `results.py` | results on disk, written atomically |
| `figures.py` | pictures of what came out |
| `vector_fields.py` | where the moves of a policy lead from each square, and the difference of two |
| `experiment.py` | the post's causal experiment in procgen, from end to end: `--only rollouts` |
| `selection.py` | which channels stand for which direction, chosen on mazes of their own |
| `labels.py` | what every channel stands for, told where the walls do not tell it already |
| `decision_squares.py` | what the policy does where the ways to the cheese and to the corner part |
| `logistic.py` | a logistic regression with a small penalty |
| `readings.py` | what channels and policy say on levels: sums, moves, labels, AUCs |
| `moved_walls.py` | contrastive pairs made from levels |
| `part.py` | what a part of the study is: a question, tables, a figure, a finding |
| `parts/` | the parts, one file each |
| `run.py` | a run of the study: parts measured, kept on disk, measured again only when something changed |
| `policies.py` | the shipped policies that stand side by side: what each is, and what tells how much was taught |
| `limits.py` | how many levels a part takes where that is not n |
| `report.py` | `report.html` and `report.md`, told from a run's CSV files |
| `evaluate.py` | a command: `python examples/maze/evaluate.py --help` |
| `training_data.py` | what a policy is trained on: labelled observations, mazes to act in |
| `training_run.py` | a training run's settings, checkpoint, log and end |
| `imitation.py` | training by imitation of shortest paths, with auxiliary losses and DAgger |
| `ppo.py` | training by reward |
| `train.py` | a command: `python examples/maze/train.py --help` |

Cells are (row, col) of the inner maze and row 0 is the bottom row, as in procgen and in its image.
"""
