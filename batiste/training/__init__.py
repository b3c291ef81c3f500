# SPDX-License-Identifier: Apache-2.0
"""What trains a model: optimizers, metrics, averages, and the parts of a functional training loop."""
