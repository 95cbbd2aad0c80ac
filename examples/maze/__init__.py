"""The maze study: procgen levels as data, a policy that solves them, and measurements of both.

| room | contents |
|---|---|
| `states.py`, `levels.py`, `paths.py` | procgen's levels as arrays, and paths in the mazes |
| `environment/` | procgen itself, pairs of levels, and `MazeVectorEnv` |
| `policy/` | the IMPALA network from a weights file, and the shipped policies |
| `weights/` | the weights, with a model card |
| `training/` | training by imitation and by reward, and evaluation of a policy |
| `analysis/` | building blocks for the measurements: readings, exact tables of every state, effects, figures |
| `measurements/` | one file per question of the study |
| `report/` | the run of all measurements, and the report on the run |

Commands: `study.py`, `train.py`, `evaluate.py`. A cell is a pair (row, col) in the inner maze. Row 0 is the bottom row,
both in procgen's grid and in the image.
"""
