//! One sleep at load while nobody waits: the first one takes long, since the pages of the copy are locked (9.4 s for a vLLM with
//! 8B, 0.4 s from then on), and shows whether it comes back.

use super::loading::Try;
use super::parking::{Shown, Turn};
use super::*;

impl Supervisor {
    /// Whether a worker that has just got ready is put to sleep and woken once: nobody waits, and it makes its copy when it is
    /// parked, not at load.
    pub(super) fn rehearses(&self, running: &Running) -> bool {
        let has_copy = running.host.bytes.is_some_and(|bytes| bytes > 0);
        let may_have = self.park_bytes.is_some_and(|bytes| bytes > 0);
        self.at_leisure && self.spec.park == Park::Ram && may_have && !has_copy && running.host.can_park != Some(false)
    }

    /// Within the limits of a park and a wake. Whatever the end but `Ready`, nothing of it runs any more.
    pub(super) async fn rehearse(&mut self, mut running: Box<Running>, mut phases: Vec<PhaseTime>) -> Try {
        let began = Instant::now();
        self.show_progress(Some(PhaseTime::REHEARSAL.to_owned()), None);
        let free = self.free_when(&mut running).await;
        // Where the driver shows no processes, totals tell nothing of it beside others who come meanwhile.
        let free = free.filter(|free| !free.is_shared || !free.pids.is_empty());
        let at_most = self.parked_use(free.as_ref()).await;
        let asleep = self.fall_asleep(&running);
        let slept = match self.meanwhile(&mut running, asleep).await {
            Turn::Done(()) => match self.shows_back(&mut running, free.as_ref(), at_most).await {
                // What the driver does not say is not held against a ready worker.
                Shown::Back | Shown::Nothing(_) => {
                    let awake = self.come_back(&running);
                    self.meanwhile(&mut running, awake).await
                }
                Shown::Kept(why) => Turn::Failed(why),
            },
            Turn::Failed(why) => Turn::Failed(why),
            Turn::Stopped => Turn::Stopped,
            Turn::Ended => Turn::Ended,
        };
        match slept {
            Turn::Done(memory) => {
                self.note_memory(&mut running, memory);
                phases.push(PhaseTime { phase: PhaseTime::REHEARSAL.to_owned(), ms: millis(began.elapsed()) });
                running.since = Instant::now();
                Try::Ready(running, phases)
            }
            Turn::Failed(why) => {
                self.release(&running);
                running.process.clear_away().await;
                Try::RehearsalFailed(why)
            }
            Turn::Stopped => {
                let ordered_at = Instant::now();
                self.enter(ModelState::Draining);
                self.release(&running);
                running.process.stop(self.around.grace).await;
                Try::Stopped(ordered_at)
            }
            Turn::Ended => {
                running.process.stop(self.around.grace).await;
                Try::Ended
            }
        }
    }
}

/// How long the rehearsal of a load took, which later loads do not have.
pub(super) fn rehearsed(phases: &[PhaseTime]) -> Duration {
    let all = phases.iter().filter(|phase| phase.phase == PhaseTime::REHEARSAL);
    Duration::from_millis(all.map(|phase| phase.ms.unsigned_abs()).sum())
}
