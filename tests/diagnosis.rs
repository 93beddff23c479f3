//! Diagnosis: spikes of made-up and recorded logs, verdicts on scripted evidence, whole recorded runs.

mod detection; // which rows of a log are spikes, and which shapes are none
mod verdicts; // every rule of the verdict, contradictory evidence included
mod whole; // recorded runs from log to proved fix: cause, cost, what is kept on disk
