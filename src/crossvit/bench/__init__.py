"""Speed against the peers, side by side: the same weights, the same images, interleaved in one run.

found = crossvit.bench.measure.bench(["crossvit_9_240"], batches=[16, 1])
"""
