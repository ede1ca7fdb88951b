//! Simple policies to compare with. They serve each model's jobs in order of arrival, whatever their class, park the least
//! recently used models in host memory, and know nothing of deadlines, tenants or prices.

use std::collections::VecDeque;

use super::Trace;
use super::engine::Policy;
use super::record::WorkerId;
use super::world::{Breach, Happening, Stage, World};

/// When a model gives way, and who comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Jobs start strictly in order of arrival: the first one blocks all others until its model is loaded.
    Fifo,
    /// A model keeps its GPUs until it is dry; then the next one in the order of the file that has work.
    Exhaustive,
    /// A model keeps its GPUs until it is dry; then the one whose oldest job came first.
    LlamaSwap,
}

/// A policy by a rule.
#[derive(Debug)]
pub struct Baseline {
    rule: Rule,
    /// Waiting jobs by model.
    queues: Vec<VecDeque<usize>>,
    /// Loads that wait for others to leave: model and first GPU.
    planned: Vec<(usize, usize)>,
    /// The model that was chosen last.
    turn: usize,
    /// When each model last left the GPUs.
    left_at: Vec<f64>,
}

impl Baseline {
    /// Nothing waits.
    pub fn new(trace: &Trace, rule: Rule) -> Self {
        let models = trace.models.len();
        Self { rule, queues: vec![VecDeque::new(); models], planned: Vec::new(), turn: 0, left_at: vec![0.0; models] }
    }

    /// The model of the job that came first of all that wait.
    fn first_model(&self) -> Option<usize> {
        let fronts = self.queues.iter().enumerate().filter_map(|(model, queue)| Some((*queue.front()?, model)));
        fronts.min().map(|(_, model)| model)
    }

    fn admit(&mut self, world: &mut World<'_>) -> Result<(), Breach> {
        if self.rule == Rule::Fifo {
            while let Some(model) = self.first_model()
                && let Some(worker) = roomy(world, model)
                && let Some(job) = self.queues[model].pop_front()
            {
                world.start(job, worker)?;
            }
            return Ok(());
        }
        for model in 0..self.queues.len() {
            while !self.queues[model].is_empty()
                && let Some(worker) = roomy(world, model)
                && let Some(job) = self.queues[model].pop_front()
            {
                world.start(job, worker)?;
            }
        }
        Ok(())
    }

    /// Models that want a worker, the first one first.
    fn wanted(&self, world: &World<'_>) -> Vec<usize> {
        let models = self.queues.len();
        let mut wanted: Vec<usize> = match self.rule {
            Rule::Fifo => self.first_model().into_iter().collect(),
            Rule::Exhaustive => (1..=models).map(|step| (self.turn + step) % models).collect(),
            Rule::LlamaSwap => {
                let mut all: Vec<usize> = (0..models).collect();
                all.sort_by_key(|model| self.queues[*model].front().copied());
                all
            }
        };
        wanted.retain(|model| {
            let has_worker = world.present().iter().any(|id| {
                let worker = world.worker(*id);
                worker.model == *model && worker.stage != Stage::Leaving
            });
            let is_planned = self.planned.iter().any(|(planned, _)| planned == model);
            !self.queues[*model].is_empty() && !has_worker && !is_planned
        });
        wanted
    }

    /// The set of GPUs for a model, and who must leave it: none if it fits beside the others, else those idle longest.
    fn place(&self, world: &World<'_>, model: usize) -> Option<(usize, Vec<WorkerId>)> {
        let needs = &world.trace().models[model];
        let mut best: Option<(f64, f64, usize, Vec<WorkerId>)> = None;
        for first in world.trace().sets(needs.gpus) {
            let Some(victims) = self.victims(world, model, first) else { continue };
            let used_at = victims.iter().map(|id| world.worker(*id).used_at).fold(f64::NEG_INFINITY, f64::max);
            let free: f64 = (first..first + needs.gpus).map(|gpu| world.gpu_free_gb(gpu)).sum();
            let is_better =
                best.as_ref().is_none_or(|(used, room, ..)| used_at < *used || (used_at == *used && free > *room));
            if is_better {
                best = Some((used_at, free, first, victims));
            }
        }
        best.map(|(_, _, first, victims)| (first, victims))
    }

    /// Idle workers whose end makes room on this set; `None`: there are not enough of them.
    fn victims(&self, world: &World<'_>, model: usize, first: usize) -> Option<Vec<WorkerId>> {
        let needs = &world.trace().models[model];
        let set = first..first + needs.gpus;
        let mut free: Vec<f64> = set.clone().map(|gpu| self.uncommitted_gb(world, gpu)).collect();
        let mut idle: Vec<WorkerId> = world.present().to_vec();
        idle.retain(|id| {
            let worker = world.worker(*id);
            let is_dry = self.rule == Rule::Fifo || self.queues[worker.model].is_empty();
            worker.stage == Stage::Ready && worker.running() == 0 && is_dry
        });
        idle.sort_by(|a, b| world.worker(*a).used_at.total_cmp(&world.worker(*b).used_at));
        let mut victims = Vec::new();
        let is_short = |free: &[f64], gpu: usize| free[gpu - first] + 1e-6 < needs.gb_per_gpu;
        for id in idle {
            let theirs = world.worker(id).gpus.clone();
            if theirs.clone().any(|gpu| set.contains(&gpu) && is_short(&free, gpu)) {
                for gpu in theirs.filter(|gpu| set.contains(gpu)) {
                    free[gpu - first] += world.model_of(id).gb_per_gpu;
                }
                victims.push(id);
            }
        }
        set.clone().all(|gpu| !is_short(&free, gpu)).then_some(victims)
    }

    /// Memory of a GPU that is neither held by a worker that stays nor promised to a planned load.
    fn uncommitted_gb(&self, world: &World<'_>, gpu: usize) -> f64 {
        let stays = |id: &&WorkerId| {
            let worker = world.worker(**id);
            worker.stage != Stage::Leaving && worker.gpus.contains(&gpu)
        };
        let held: f64 = world.present().iter().filter(stays).map(|id| world.model_of(*id).gb_per_gpu).sum();
        let models = &world.trace().models;
        let planned = self.planned.iter().map(|(model, first)| (&models[*model], *first));
        let promised: f64 =
            planned.filter(|(m, first)| (*first..first + m.gpus).contains(&gpu)).map(|(m, _)| m.gb_per_gpu).sum();
        world.trace().gpu_gb - held - promised
    }

    fn send_away(&mut self, world: &mut World<'_>, id: WorkerId) -> Result<(), Breach> {
        let model = world.worker(id).model;
        let needs = world.model_of(id).parked_gb();
        let park = needs <= world.trace().host_gb;
        while park && world.host_free_gb() + 1e-6 < needs {
            let parked = (0..self.queues.len()).filter(|other| world.is_parked(*other));
            let oldest = parked.min_by(|a, b| self.left_at[*a].total_cmp(&self.left_at[*b]));
            // Those that are being parked cannot be forgotten yet.
            let Some(oldest) = oldest else { break };
            world.unpark(oldest);
        }
        self.left_at[model] = world.now();
        let park = park && world.host_free_gb() + 1e-6 >= needs;
        world.leave(id, park)
    }

    fn load_planned(&mut self, world: &mut World<'_>) -> Result<(), Breach> {
        for (model, first) in std::mem::take(&mut self.planned) {
            if world.fits(model, first) {
                world.load(model, first, world.is_parked(model))?;
            } else {
                self.planned.push((model, first));
            }
        }
        Ok(())
    }
}

/// A worker of the model that can take one more job now, the emptiest one.
fn roomy(world: &World<'_>, model: usize) -> Option<WorkerId> {
    let of_model = world.present().iter().copied().filter(|id| world.worker(*id).model == model);
    of_model.filter(|id| world.room(*id) > 0).min_by_key(|id| world.worker(*id).running())
}

impl Policy for Baseline {
    fn act(&mut self, world: &mut World<'_>, happened: &[Happening]) -> Result<Option<f64>, Breach> {
        for event in happened {
            if let Happening::Arrived(jobs) = event {
                jobs.clone().for_each(|job| self.queues[world.trace().jobs[job].model].push_back(job));
            }
        }
        self.load_planned(world)?;
        self.admit(world)?;
        for model in self.wanted(world) {
            if let Some((first, victims)) = self.place(world, model) {
                for victim in victims {
                    self.send_away(world, victim)?;
                }
                self.planned.push((model, first));
                self.turn = model;
                self.load_planned(world)?;
            }
        }
        Ok(None)
    }
}
