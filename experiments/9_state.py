"""9. Which part of a full state does a resume need, and why?

At step 200 of 400 a part of the state is set to 0 (edit_state.py), and the run goes on. AdamW
(Loshchilov & Hutter 2019, algorithm 2) moves a weight by lr · m̂ / √v̂. These are the averages of its
gradients and of their squares, each divided by 1 − beta^count. `predicted` says how large that is
if gradients are nothing but noise.
"""
import math

BETA1 = 0.9


def predicted(zeroed, beta2, k, count=200):
    """RMS of the k-th update after a resume, divided by lr, if each gradient is an independent
    normal number of mean 0: then its size cancels. zeroed: names in AdamW's state. count: updates
    before the resume."""
    m2 = (1 - BETA1) / (1 + BETA1)  # mean square of the average, of gradients of variance 1
    v = 1 - beta2 ** (count + k)
    if "exp_avg" in zeroed:
        m2 *= 1 - BETA1 ** (2 * k)
    if "exp_avg_sq" in zeroed:
        v = 1 - beta2 ** k
    if "step" in zeroed:
        count = 0
    return math.sqrt(m2 / (v / (1 - beta2 ** (count + k)))) / (1 - BETA1 ** (count + k))
