"""The maze study: procgen levels as data, a policy that solves them, and measurements of both.

| room | contents |
|---|---|
| `states.py`, `levels.py`, `paths.py` | procgen's levels as arrays, and paths in them |
| `environment/` | procgen itself, pairs of levels, and `MazeVectorEnv` |
| `policy/` | the IMPALA network from a weights file, and the shipped policies |
| `weights/` | the weights, with a model card |
| `training/` | imitation, reward, and the evaluation of a policy |
| `analysis/` | primitives of the measurements: readings, exact tables of every state, effects, figures |
| `measurements/` | one file per question of the study |
| `report/` | a run of all measurements, and its page |

Commands: `study.py`, `train.py`, `evaluate.py`. Cells are (row, col) of the inner maze. Row 0 is the bottom row, as in
procgen and in its image.
"""
