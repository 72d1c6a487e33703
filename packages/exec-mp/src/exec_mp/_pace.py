"""When to yield and when to sleep while waiting for what comes again and again. Pure: no clock, no I/O.

    begin -> yield until `spin_until` -> sleep for `rest`, until shortly before it usually comes -> `woken`: yield until
    somewhat after it should have come -> sleep for `rest`, as long as it takes -> over

Who is woken from a long sleep starts late and with cold caches: a step of decoding loses 0.1 ms and more to that, on each
side. But steps take about as long as the ones before them. So a waiter whose waits are regular takes a nap, and is awake and
warm when what it waits for comes. Where they are not regular, it sleeps until it is woken. On fewer processors than there are
processes, who is awake early keeps another from running: all are less early, and where a processor is for two, ranks sleep
until they are woken.
"""

from __future__ import annotations

import math

_GAIN = 0.25  # of a new wait in the averages
_FAR_S = 0.001  # a wait that is so far off the usual is an odd one; with a second one in a row, averages start anew
_RARE = 1 / 50  # of the waits are over before the waiter is awake
_WIDE = 5  # times the average distance from the usual: how much earlier than that to be awake at most
_LEAST_S = 20e-6  # to be earlier by less means nothing to a scheduler
_SHARE = 1 / 10  # of a wait, at most, to be spent on being awake in time
_EARLY = 2.5  # times `spin_s`: how much earlier than usual to be awake at most, with a processor of its own
_LONGER = 2.0  # times `spin_s`: how much longer to stay awake than it usually takes at most
_OTHERS = 0.5  # times `spin_s`: how long to yield for the other ranks once one has answered, before sleeping again


class Pace:
    """Of one waiter. All times are in seconds, points in time those of one monotonic clock.

    Args:
        spin_s: how long to yield at most, at a time, where nothing can be foreseen.
        room: part of a processor that a waiter can have while others work; with less it is awake less early.

    Attributes:
        spin_until: until when to yield.
        others_s: how long to yield when the first of several has come.
        slept: whether there was a `rest` since `begin`.
        came: to be set when a wait in which that is so is over. What is learnt from it has time until the next one begins:
            now there is something to do.
    """

    def __init__(self, spin_s: float, room: float = 1.0) -> None:
        self.spin_s = self._patience_s = spin_s
        self.others_s = _OTHERS * spin_s
        self._earliest_s = _EARLY * spin_s * room**2  # who keeps others from running makes them late as well
        self.spin_until = self.came = self._began = 0.0
        self.slept = False
        self._awake_at = math.inf  # end of the nap that is being taken
        self._usual_s = 0.0  # average of the waits that were slept through
        self._was_odd = True  # the last one was far from it
        self._error_s = math.inf  # average distance from it
        self._early_s = math.inf  # a wait is rarely shorter than usual by more
        self._margin_s: float | None = None  # how much earlier than usual to be awake; None: it cannot be foreseen
        self._late_s = 50e-6  # average time from a nap's end to being awake

    def begin(self, now: float) -> None:
        """A wait begins."""
        if self.slept:
            if self.came > self._began:  # else it was given up
                self._learn(self.came - self._began)
            self.slept = False
        self._began, self.spin_until = now, now + self._patience_s

    def rest(self, now: float) -> float:
        """How long to sleep if nothing comes; infinity until it does."""
        if not self.slept:
            self.slept = True
            if self._margin_s is not None:
                nap_s = self._began + self._usual_s - self._margin_s - self._late_s - now
                if nap_s > 0:
                    self._awake_at = now + nap_s
                    return nap_s
        return math.inf

    def woken(self, now: float) -> None:
        """The sleep is over."""
        if self._awake_at <= now:  # by itself
            self._late_s += (min(now - self._awake_at, self.spin_s) - self._late_s) * _GAIN
            # What comes late costs only then, and it is the late steps that people notice.
            self.spin_until = self._began + self._usual_s + (self._margin_s or 0.0) + _LONGER * self.spin_s
        self._awake_at = math.inf

    def _learn(self, waited_s: float) -> None:
        """From a wait that was slept through. After a long one, the next one is slept through from the start.

        In few steps: caches are cold between one wait and the next, so each costs many times what it costs elsewhere.
        """
        spin_s, usual_s, error_s = self.spin_s, self._usual_s, self._error_s
        self._patience_s = spin_s if waited_s < 4 * spin_s else 0.0
        early_s = usual_s - waited_s
        off_s = early_s if early_s > 0 else -early_s
        if off_s <= _FAR_S:
            usual_s -= early_s * _GAIN
            self._was_odd = False
        else:
            off_s = _FAR_S
            if self._was_odd:
                usual_s = waited_s
            self._was_odd = not self._was_odd
        error_s = min(error_s, _FAR_S)
        error_s += (off_s - error_s) * _GAIN
        # Up by nearly an average distance when a wait was shorter than that, else down by very little: in balance it is rare.
        margin_s = self._early_s + error_s * ((early_s > self._early_s) - _RARE)
        margin_s = min(margin_s, _WIDE * error_s)
        self._usual_s, self._error_s, self._early_s = usual_s, error_s, margin_s
        most_s = min(self._earliest_s, _SHARE * usual_s)
        margin_s += _LEAST_S
        self._margin_s = None if error_s > most_s else min(most_s, margin_s)
