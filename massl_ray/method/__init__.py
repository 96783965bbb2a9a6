"""The science: views, backbone and head, memory, read-out, schedules, optimizer, step. Torch only; knows nothing of Ray or of runs.

Letters in shapes: B images, V views, K memory slots, S slots a block, D embedding width, N = V * B rows, view-major.
"""
