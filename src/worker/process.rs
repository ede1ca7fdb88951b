//! One worker process: start under the guard, log capture, stop of the whole group, sweep by instance mark.
