//! Spikes, interventions, shares, verdicts: pure functions of evidence.
