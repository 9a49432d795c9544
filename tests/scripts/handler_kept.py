"""Preparing a model leaves the handler of Ctrl-C as it was."""

import signal

import cann_host

cann_host.activate()

import lq_graph  # noqa: E402

handler = signal.getsignal(signal.SIGINT)
lq_graph.use_internal_format_weight(lq_graph.LinearQuant(64, 32).npu())
assert signal.getsignal(signal.SIGINT) is handler
