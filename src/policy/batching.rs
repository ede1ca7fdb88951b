//! How many jobs of one shape (batch key) go into the next pass, learned from how long passes took. Pure.
//!
//! Sizes are compared by powers of two, by the medians of their last passes. From the smallest up, a size is used if it does
//! [`GAIN`] times as many jobs a second as the best one below; one that is in use stays in use down to [`KEEP`], so that noise
//! moves nothing. What was not measured yet is tried: the sizes above, one after the other up to the most, by batch jobs only;
//! the one below rarely, since it may cost throughput, but at once again as long as it costs none. Neighbours of the size in
//! use are measured anew after [`STALE_PASSES`].
//!
//! A pass that ran out of memory halves the most for its shape. If a job of it runs out of memory alone, too, that was its own
//! fault: what passes with it have set is taken back. Not before another pass is answered: of a shape that never fits, each job
//! would halve the passes again.
//!
//! What is known of the shapes used last outlives a restart of the server, and is a start: new passes soon outweigh it.

use std::collections::{HashMap, VecDeque};

use crate::domain::Millis;
use crate::domain::shape::{ALONE, Halving, KeptShape};
use crate::policy::decision::{Decision, short};

/// A larger size must do so many times the jobs a second.
pub const GAIN: f64 = 1.10;
/// The same for the size in use.
pub const KEEP: f64 = 1.05;
/// Passes of a size from which on something is known of it.
pub const SAMPLES_MIN: usize = 3;
/// Passes of a size that count.
const SAMPLES_KEPT: usize = 9;
/// Passes between two tries of a smaller size that cost throughput.
pub const TRY_LESS_EVERY: u64 = 16;
/// Passes after which a neighbour of the size in use is measured anew.
pub const STALE_PASSES: u64 = 128;
/// Shapes of a model that are remembered: those used last.
const SHAPES_MAX: usize = 256;
/// Of these, so many are shown, and outlive a restart.
const SHOWN_MAX: usize = 16;
/// A shape of which all is left to the worker.
const DEFAULTS: &str = "defaults";
/// Loads that a shape remembers: more than a model has workers.
const LOADS_MAX: usize = 64;

/// A pass whose jobs were all answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// How many they were.
    pub jobs: u32,
    /// From the claim to the last end, ms.
    pub ms: Millis,
    /// Which load of the model: the first pass of a shape after a load warms up, and counts for nothing.
    pub load: i64,
}

/// The passes of one size: from 2^n jobs to less than twice as many.
#[derive(Clone, Debug, Default, PartialEq)]
struct Level {
    /// Jobs a second, latest last.
    rates: VecDeque<f64>,
    /// Number of the shape's pass that was measured last.
    at: u64,
}

impl Level {
    fn median(&self) -> Option<f64> {
        let mut rates: Vec<f64> = self.rates.iter().copied().collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied()
    }
}

/// What is known about one shape.
#[derive(Clone, Debug, PartialEq)]
struct Shape {
    words: String,
    levels: Vec<Level>,
    /// Most jobs of a pass: less than the model's after one ran out of memory. What is known of larger ones is kept.
    most: u32,
    /// The passes that ran out of memory, the oldest first.
    halvings: Vec<Halving>,
    /// Tried by itself up to here.
    tried: u32,
    /// The level in use; `None`: that of the model's first size, which is not known yet.
    level: Option<u32>,
    passes: u64,
    /// When a smaller size was tried last, as a number of its passes.
    tried_less: u64,
    /// Loads that have made a pass of it, latest last.
    loads: VecDeque<i64>,
    /// When it was used last, as a number of the model's passes.
    used: u64,
}

impl Shape {
    fn rate(&self, level: u32) -> Option<f64> {
        self.rate_beyond(level).filter(|_| level <= level_of(self.most))
    }

    /// The same of a level that may be beyond the most.
    fn rate_beyond(&self, level: u32) -> Option<f64> {
        self.levels.get(level as usize).filter(|level| level.rates.len() >= SAMPLES_MIN)?.median()
    }

    /// The best of the known levels up to this one.
    fn best(&self, up_to: u32) -> Option<u32> {
        (0..=up_to)
            .filter_map(|level| Some((level, self.rate(level)?)))
            .fold(None, |best, (level, rate)| match best {
                None => Some((level, rate)),
                Some((_, below)) => {
                    let factor = if self.level == Some(level) { KEEP } else { GAIN };
                    if rate > factor * below { Some((level, rate)) } else { best }
                }
            })
            .map(|(level, _)| level)
    }

    /// Tries by itself what is above the known sizes.
    fn go_on(&mut self) {
        while self.tried < self.most && self.rate(level_of(self.tried)).is_some() {
            self.tried = (2 << level_of(self.tried)).min(self.most);
        }
    }

    /// What is worth keeping has changed if this has: the size in use, the most, and which sizes are known.
    fn outline(&self) -> (Option<u32>, u32, Vec<u32>) {
        (self.level, self.most, self.known().map(|(level, _)| level).collect())
    }

    /// Jobs a second by the known levels.
    fn known(&self) -> impl Iterator<Item = (u32, f64)> {
        (0..=level_of(self.most)).filter_map(|level| Some((level, self.rate(level)?)))
    }

    /// The same, also beyond the most.
    fn known_beyond(&self) -> impl Iterator<Item = (u32, f64)> {
        (0..).zip(&self.levels).filter_map(|(level, _)| Some((level, self.rate_beyond(level)?)))
    }

    /// Puts the best level in use, once that of the first size is known.
    fn choose(&mut self, first: u32) {
        if self.level.is_some() || self.rate(level_of(first.min(self.most))).is_some() {
            self.level = self.best(level_of(self.most)).or(self.level);
        }
    }

    /// Most jobs of a pass, of at most `all`.
    fn limit(&mut self, all: u32) {
        self.most = self.halvings.iter().map(|halving| halving.most).fold(all, u32::min).max(1);
    }

    /// Goes back to before the halvings that were a job's own fault; false: there are none.
    fn take_back(&mut self, all: u32) -> bool {
        let Some(level) = self.halvings.iter().find(|halving| halving.own_fault).map(|halving| halving.level) else {
            return false;
        };
        self.halvings.retain(|halving| !halving.own_fault);
        self.limit(all);
        self.level = level.map(|level| level.min(level_of(self.most)));
        true
    }

    /// Jobs of a pass when enough wait.
    fn size(&self, first: u32) -> u32 {
        match self.level {
            None => first.min(self.most),
            Some(level) if level == level_of(self.most) => self.most,
            Some(level) => 1 << level,
        }
    }

    /// Whether the next pass is to try the level below this one.
    fn tries_less(&self, level: u32) -> bool {
        let Some(below) = level.checked_sub(1).filter(|below| self.level == Some(level) && self.rate(*below).is_none())
        else {
            return false;
        };
        let seen = self.levels.get(below as usize).and_then(Level::median);
        let costs_nothing = seen.zip(self.rate(level)).is_some_and(|(below, rate)| rate <= GAIN * below);
        costs_nothing || self.passes >= self.tried_less + TRY_LESS_EVERY
    }

    fn measure(&mut self, pass: Pass) {
        let at = level_of(pass.jobs) as usize;
        if self.levels.len() <= at {
            self.levels.resize_with(at + 1, Level::default);
        }
        let level = &mut self.levels[at];
        level.rates.push_back(f64::from(pass.jobs) * 1e3 / pass.ms.max(1) as f64);
        if level.rates.len() > SAMPLES_KEPT {
            level.rates.pop_front();
        }
        level.at = self.passes;
        if self.level.is_some_and(|level| at as u32 + 1 == level) {
            self.tried_less = self.passes;
        }
    }

    /// Forgets what is old of the neighbours of the level in use, so that they are tried again.
    fn forget_stale(&mut self) {
        let Some(level) = self.level else { return };
        let passes = self.passes;
        for neighbour in [level.checked_sub(1), level.checked_add(1)].into_iter().flatten() {
            let known = self.levels.get_mut(neighbour as usize).filter(|level| level.rates.len() >= SAMPLES_MIN);
            if let Some(known) = known.filter(|known| passes >= known.at + STALE_PASSES) {
                known.rates.clear();
            }
        }
    }
}

/// The level of a size: its power of two, rounded down.
fn level_of(jobs: u32) -> u32 {
    jobs.max(1).ilog2()
}

/// A shape whose passes take another number of jobs from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// In words; empty: all of it is left to the worker, or nobody knows.
    words: String,
    from: u32,
    to: u32,
    /// Jobs a second of both, as far as they are known.
    rates: [Option<f64>; 2],
    cause: Cause,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cause {
    /// That is what passes took.
    Measured,
    /// So many at once ran out of memory.
    OutOfMemory(u32),
    /// One of those that ran out of memory did so alone, too.
    OwnFault,
}

impl Change {
    /// As a decision, with the reason in words.
    pub fn decision(&self, model: &str, now: Millis) -> Decision {
        let shape = if self.words.is_empty() { String::new() } else { format!(" ({})", self.words) };
        let of = |jobs: u32| if jobs == 1 { "1 job".to_owned() } else { format!("{jobs} jobs") };
        let head = format!("{model}{shape}: {} a pass from now on", of(self.to));
        let (code, reason) = match (self.cause, self.rates) {
            (Cause::OutOfMemory(jobs), _) => ("worker_oom", format!("{head}, {jobs} at once ran out of memory")),
            (Cause::OwnFault, _) => {
                ("worker_oom", format!("{head}, before {}: a job ran out of memory alone", self.from))
            }
            (Cause::Measured, [Some(from), Some(to)]) => {
                let (from, to) = (short_rate(from), short_rate(to));
                ("batch", format!("{head}, {to} a second; with {} it was {from}", self.from))
            }
            (Cause::Measured, _) => ("batch", format!("{head}, before {}", self.from)),
        };
        let mut numbers = vec![("jobs", f64::from(self.to)), ("jobs_before", f64::from(self.from))];
        numbers.extend(self.rates[0].map(|rate| ("jobs_per_second_before", rate)));
        numbers.extend(self.rates[1].map(|rate| ("jobs_per_second", rate)));
        Decision::new(now, "batch", code, reason).of(model).with(&numbers)
    }
}

/// `0.88`, `12`.
fn short_rate(rate: f64) -> String {
    if rate < 1.0 { format!("{rate:.2}") } else { short(rate * 1e3) }
}

/// What is known about a shape, for those who ask.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ShapeView {
    /// In words: `size 1024x1024, steps 4`; `defaults`: all of it is left to the worker, or nobody has said yet.
    pub shape: String,
    /// Its batch key, in hexadecimal digits.
    pub key: String,
    /// Jobs in a pass, when enough wait.
    pub batch_size: u32,
    /// Most of them.
    pub max_batch: u32,
    /// Jobs a second by the jobs in a pass, as far as it is known: (jobs at least, jobs a second).
    pub per_s: Vec<(u32, f64)>,
}

/// The sizes of the passes of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Batching {
    first: u32,
    most: u32,
    shapes: HashMap<i64, Shape>,
    passes: u64,
    latest: Option<i64>,
    /// Something was learned that is worth keeping.
    has_news: bool,
}

impl Batching {
    /// Passes of `first` jobs until something is known, never of more than `most`.
    pub fn new(first: u32, most: u32) -> Self {
        let most = most.max(1);
        Self { first: first.clamp(1, most), most, shapes: HashMap::new(), passes: 0, latest: None, has_news: false }
    }

    /// Whether passes may have more than one job.
    pub fn is_on(&self) -> bool {
        self.most > 1
    }

    /// How many of the `waiting` jobs of a shape the next pass takes, at least 1; `callers`: one of them is waited for on the
    /// line, and nothing is tried that may take longer.
    pub fn next(&self, key: i64, waiting: u32, callers: bool) -> u32 {
        let Some(shape) = self.shapes.get(&key) else { return waiting.min(self.first).max(1) };
        let tried = if callers { shape.size(self.first) } else { shape.tried };
        let jobs = waiting.min(shape.most).min(tried).max(1);
        let level = level_of(jobs);
        let best = match shape.rate(level) {
            Some(_) => shape.best(level).unwrap_or(level),
            // It is measured by this.
            None => return jobs,
        };
        let unknown = (best + 1..level).find(|level| !callers && shape.rate(*level).is_none());
        if let Some(unknown) = unknown {
            1 << unknown
        } else if shape.tries_less(best) {
            1 << (best - 1)
        } else if best == level {
            jobs
        } else {
            1 << best
        }
    }

    /// A pass has ended well.
    pub fn passed(&mut self, key: i64, pass: Pass) -> Option<Change> {
        if !self.is_on() || key == ALONE {
            return None;
        }
        let (first, most) = (self.first, self.most);
        let shape = self.shape(key);
        shape.passes += 1;
        let (before, outline) = ((shape.level, shape.size(first)), shape.outline());
        let cause = if shape.take_back(most) { Cause::OwnFault } else { Cause::Measured };
        let is_warm = shape.loads.contains(&pass.load);
        if is_warm {
            shape.measure(pass);
        } else {
            shape.loads.push_back(pass.load);
            if shape.loads.len() > LOADS_MAX {
                shape.loads.pop_front();
            }
        }
        if is_warm || cause == Cause::OwnFault {
            shape.go_on();
            shape.choose(first);
        }
        let is_news = cause == Cause::OwnFault || shape.outline() != outline;
        if is_warm {
            shape.forget_stale();
        }
        let (from, to) = (before.1, shape.size(first));
        let rates = [before.0.unwrap_or(level_of(from)), shape.level.unwrap_or(0)].map(|level| shape.rate(level));
        let words = shape.words.clone();
        self.has_news |= is_news;
        (from != to).then_some(Change { words, from, to, rates, cause })
    }

    /// A job ran out of memory alone: what passes with it have set is taken back by the next one that is answered.
    pub fn own_fault(&mut self, key: i64, number: i64) {
        let Some(shape) = self.shapes.get_mut(&key) else { return };
        for halving in shape.halvings.iter_mut().filter(|halving| !halving.own_fault && halving.jobs.contains(&number))
        {
            halving.own_fault = true;
            self.has_news = true;
        }
    }

    /// A pass of so many jobs ran out of memory, with these `numbers`: from now on it is at most half as many.
    pub fn out_of_memory(&mut self, key: i64, jobs: u32, numbers: Vec<i64>) -> Option<Change> {
        if !self.is_on() || key == ALONE || jobs < 2 {
            return None;
        }
        let first = self.first;
        let shape = self.shape(key);
        if jobs / 2 >= shape.most {
            return None;
        }
        let from = shape.size(first);
        shape.most = jobs / 2;
        shape.halvings.push(Halving { most: jobs / 2, level: shape.level, jobs: numbers, own_fault: false });
        shape.level = shape.level.map(|level| level.min(level_of(shape.most)));
        let (to, words) = (shape.size(first), shape.words.clone());
        self.has_news = true;
        Some(Change { words, from, to, rates: [None; 2], cause: Cause::OutOfMemory(jobs) })
    }

    /// What a shape is, in words.
    pub fn name(&mut self, key: i64, words: String) {
        if self.is_on() && key != ALONE {
            self.shape(key).words = words;
        }
    }

    /// Jobs of a pass of the shape that was used last, when enough wait.
    pub fn usual(&self) -> u32 {
        self.latest.and_then(|key| self.shapes.get(&key)).map_or(self.first, |shape| shape.size(self.first))
    }

    /// Whether something was learned since this was asked last that is worth keeping: few passes teach anything new.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// What outlives a restart.
    pub fn kept(&self) -> Vec<KeptShape> {
        let keep = |(key, shape): (&i64, &Shape)| KeptShape {
            key: *key,
            words: shape.words.clone(),
            level: shape.level,
            cap: Some(shape.most).filter(|most| *most < self.most),
            rates: shape.known_beyond().collect(),
            halvings: shape.halvings.clone(),
        };
        self.latest().take(SHOWN_MAX).map(keep).collect()
    }

    /// Takes in what was known before a restart, as far as passes of so many are made now.
    pub fn restore(&mut self, kept: &[KeptShape]) {
        if !self.is_on() {
            return;
        }
        for known in kept.iter().rev().filter(|known| known.key != ALONE) {
            let (first, all) = (self.first, self.most);
            let shape = self.shape(known.key);
            shape.words.clone_from(&known.words);
            shape.halvings.clone_from(&known.halvings);
            // As an earlier release kept it.
            let cap = known.cap.filter(|_| known.halvings.is_empty());
            shape.halvings.extend(cap.map(|most| Halving { most, level: None, jobs: Vec::new(), own_fault: false }));
            shape.limit(all);
            let top = level_of(all);
            shape.levels = vec![Level::default(); top as usize + 1];
            for (level, rate) in known.rates.iter().filter(|(level, rate)| *level <= top && *rate > 0.0) {
                shape.levels[*level as usize].rates = VecDeque::from([*rate; SAMPLES_MIN]);
            }
            let level = known.level.map(|level| level.min(level_of(shape.most)));
            shape.level = level.filter(|level| shape.rate(*level).is_some());
            shape.tried = shape.known_beyond().last().map_or(first, |(level, _)| first.max(1 << level));
            shape.go_on();
        }
    }

    /// The shapes, last used first.
    fn latest(&self) -> impl Iterator<Item = (&i64, &Shape)> {
        let mut latest: Vec<(&i64, &Shape)> = self.shapes.iter().collect();
        latest.sort_by_key(|(_, shape)| std::cmp::Reverse(shape.used));
        latest.into_iter()
    }

    /// The shapes, last used first, for those who ask.
    pub fn shapes(&self) -> Vec<ShapeView> {
        let view = |(key, shape): (&i64, &Shape)| ShapeView {
            shape: if shape.words.is_empty() { DEFAULTS.to_owned() } else { shape.words.clone() },
            key: format!("{key:016x}"),
            batch_size: shape.size(self.first),
            max_batch: shape.most,
            per_s: (0..=level_of(self.most)).filter_map(|level| Some((1 << level, shape.rate(level)?))).collect(),
        };
        self.latest().take(SHOWN_MAX).map(view).collect()
    }

    fn shape(&mut self, key: i64) -> &mut Shape {
        self.passes += 1;
        self.latest = Some(key);
        if self.shapes.len() >= SHAPES_MAX && !self.shapes.contains_key(&key) {
            let oldest = self.shapes.iter().min_by_key(|(_, shape)| shape.used).map(|(key, _)| *key);
            oldest.and_then(|key| self.shapes.remove(&key));
        }
        let shape = self.shapes.entry(key).or_insert_with(|| Shape {
            words: String::new(),
            levels: Vec::new(),
            most: self.most,
            halvings: Vec::new(),
            tried: self.first,
            level: None,
            passes: 0,
            tried_less: 0,
            loads: VecDeque::new(),
            used: 0,
        });
        shape.used = self.passes;
        shape
    }
}

#[cfg(test)]
#[path = "batching_tests.rs"]
mod tests;
