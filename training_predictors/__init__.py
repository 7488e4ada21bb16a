"""Model + text -> predictors: record, train, calibrate, report. The `train-predictors` command.

Knows the runtime's forward and the predictor's files. Knows nothing of serving.
"""
