//! An edited models.yaml: only what changed is touched, and no job is lost by it.

use super::*;

/// One entry of models.yaml that is new, changed or gone.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    /// Entry name.
    pub name: String,
    /// As it is now; `None`: it is gone.
    pub spec: Option<ModelSpec>,
    /// Keys of it that are written in another way now; none: it is new, or gone.
    pub keys: Vec<&'static str>,
    /// Its workers are not what they would be if they were started now.
    pub restart: bool,
}

/// What changed, in the order of the new file, what is gone last.
pub fn edits(old: &[ModelSpec], new: &[ModelSpec]) -> Vec<Edit> {
    let of = |specs: &'_ [ModelSpec], name: &str| specs.iter().find(|spec| spec.name == name).cloned();
    let kept = new.iter().filter_map(|spec| {
        let before = of(old, &spec.name);
        let keys = before.as_ref().map(|before| before.edited_keys(spec));
        // Another default port is no edit: the entry has only moved.
        (keys.as_ref().is_none_or(|keys| !keys.is_empty())).then(|| Edit {
            name: spec.name.clone(),
            spec: Some(spec.clone()),
            keys: keys.unwrap_or_default(),
            restart: before.is_none_or(|before| !before.starts_as(spec)),
        })
    });
    let gone = old.iter().filter(|spec| of(new, &spec.name).is_none());
    let gone = gone.map(|spec| Edit { name: spec.name.clone(), spec: None, keys: Vec::new(), restart: true });
    kept.chain(gone).collect()
}

impl State {
    /// Takes the edits in. Workers that would be others now finish what they run and are stopped; the next load is of the
    /// new entry. Jobs of a model that is gone wait until it is back, or until their deadline.
    pub(super) fn on_edits(&mut self, edits: &[Edit], now: Millis) -> Vec<Effect> {
        let (mut effects, pins) = (Vec::new(), self.pins());
        for Edit { name, spec, keys, restart } in edits {
            let index = self.index_of(name).unwrap_or_else(|| self.add_model(name));
            let model = &mut self.models[index];
            let what = match spec {
                Some(spec) => {
                    let was_listed = model.is_listed;
                    model.take_entry(spec, *restart);
                    model.queue.readmit(now);
                    if was_listed { "changed" } else { "added" }
                }
                None => {
                    model.lose_entry(None);
                    "removed"
                }
            };
            if *restart {
                self.look_for_weights_again(index);
                // What loads would come to is not wanted any more.
                self.workers.iter_mut().filter(|w| w.model == index).for_each(|worker| worker.is_outdated = true);
                self.unload(index, now, &mut effects);
            }
            let then = match what {
                "added" => "it can be used now",
                "removed" => {
                    "its waiting jobs wait until it is back, its worker stops when its running jobs have ended"
                }
                _ if *restart => "its next load is of the new entry, its worker stops when its running jobs have ended",
                _ => "its worker goes on",
            };
            let keys = if keys.is_empty() { String::new() } else { format!(" ({})", keys.join(", ")) };
            let reason = format!("reload {name}: {what} in models.yaml{keys}; {then}");
            let decision = Decision::new(now, "reload", "edited", reason);
            self.announce(Decision { model: Some(name.clone()), ..decision }, &mut effects);
        }
        (0..self.models.len()).for_each(|index| self.note_heir(index));
        self.note_pins(&pins);
        self.note_all_devices();
        self.drop_beyond_host(now, &mut effects);
        self.plan_now = true;
        effects
    }

    /// Jobs of an endpoint that their model does not serve wait until another edit.
    pub(super) fn on_unserved(&mut self, model: &str, jobs: Vec<(u8, i64)>, claimed: bool, now: Millis) {
        if claimed {
            self.on_unclaimed(model, jobs.iter().map(|(_, number)| *number).collect(), now);
        }
        let Some(index) = self.index_of(model) else { return };
        for (priority, number) in jobs {
            self.models[index].queue.set_aside(priority, number);
        }
    }

    /// What the jobs of a model without an entry wait for, which depends on whose alias its name is.
    pub(super) fn note_heir(&mut self, index: usize) {
        let model = &self.models[index];
        if !model.is_listed {
            let heir = self.models.iter().find(|other| other.aliases.iter().any(|alias| **alias == *model.name));
            let heir = heir.map(|heir| heir.name.clone());
            self.models[index].lose_entry(heir.as_deref());
        }
    }

    /// Whether there is anything to tell about a model: it has an entry, or jobs or a worker that it had are left.
    pub(in crate::scheduler) fn is_known(&self, index: usize) -> bool {
        let model = &self.models[index];
        let has_jobs = model.queue.len() > 0 || model.under_way() > 0;
        model.is_listed || has_jobs || self.workers.iter().any(|worker| worker.model == index)
    }

    /// Takes other knobs and another budget for parked workers, in bytes. Call before [`Event::Edited`], which drops what lies
    /// beyond it.
    pub fn set_knobs(&mut self, knobs: Knobs, park_bytes: u64, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        let keys = self.knobs.edited_keys(&knobs);
        self.knobs = knobs;
        self.inventory.host = park_bytes;
        self.plan_now = true;
        if !keys.is_empty() {
            let reason = format!("reload: `scheduler:` changed in models.yaml ({}); it holds at once", keys.join(", "));
            self.announce(Decision::new(now, "reload", "edited", reason), &mut effects);
        }
        effects
    }

    /// Whether a supervisor of this number is needed: models.yaml asks for it, or a worker of it is still there.
    pub(in crate::scheduler) fn needs_supervisor(&self, name: &str, replica: u32) -> bool {
        self.index_of(name).is_some_and(|index| {
            let model = &self.models[index];
            (model.is_listed && replica < model.max_replicas()) || self.find(index, replica).is_some()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::supervisor::Order;

    fn spec(name: &str) -> ModelSpec {
        crate::scheduler::state::tests::spec(name, 4)
    }

    #[test]
    fn only_what_changed_is_an_edit_and_only_what_the_process_sees_a_restart() {
        let old = [spec("same"), spec("limit"), spec("args"), spec("gone")];
        let limit = ModelSpec { limit: 99, aliases: vec!["x".into()], ..spec("limit") };
        let args = ModelSpec { args: vec!["--new".into()], ..spec("args") };
        let edits = edits(&old, &[spec("new"), args, spec("same"), limit]);
        let shown: Vec<_> = edits.iter().map(|edit| (edit.name.as_str(), edit.spec.is_some(), edit.restart)).collect();
        let expected = [("new", true, true), ("args", true, true), ("limit", true, false), ("gone", false, true)];
        assert_eq!(shown, expected);
    }

    #[test]
    fn an_entry_that_has_only_moved_is_no_edit_and_keys_that_differ_are_named() {
        let at = |port: u16, has_own_port: bool| ModelSpec { port, has_own_port, ..spec("a") };
        assert_eq!(edits(&[at(8002, false)], &[at(8001, false)]), []);
        let edited = edits(&[at(8002, true)], &[at(8001, true)]);
        assert_eq!((edited[0].keys.as_slice(), edited[0].restart), (["port"].as_slice(), true));
        let both = ModelSpec { limit: 9, args: vec!["--new".into()], ..spec("a") };
        let edited = edits(&[spec("a")], &[both]);
        assert_eq!(edited[0].keys, ["args", "limit"]);
        let mut state = State::new(&[spec("a")], Knobs::default(), &BTreeMap::new(), 1);
        state.on_event(Event::Edited(edited), 0);
        let said = state.decisions().next().expect("a decision");
        assert!(said.reason.contains("changed in models.yaml (args, limit); its next load"), "{}", said.reason);
    }

    #[test]
    fn knobs_that_differ_are_named() {
        let mut state = State::new(&[spec("a")], Knobs::default(), &BTreeMap::new(), 1);
        assert!(state.set_knobs(Knobs::default(), 9, 0).is_empty(), "the same");
        let knobs = Knobs { queued_max: 3, swap_budget_other: 0.3, ..Knobs::default() };
        let effects = state.set_knobs(knobs, 9, 0);
        assert!(matches!(effects[..], [Effect::Announce(_)]), "{effects:?}");
        let said = state.decisions().next().expect("a decision");
        let words = "reload: `scheduler:` changed in models.yaml (swap_budget, queued_max); it holds at once";
        assert_eq!((said.action, said.model.as_deref(), said.reason.as_str()), ("reload", None, words));
    }

    #[test]
    fn a_model_that_is_gone_is_known_while_it_has_jobs_and_they_hear_of_its_heir() {
        let mut state = State::new(&[spec("old"), spec("b")], Knobs::default(), &BTreeMap::new(), 1);
        let job = crate::scheduler::state::tests::job(1, "old");
        state.on_event(Event::Queued(vec![job]), 0);
        let heir = ModelSpec { aliases: vec!["old".into()], ..spec("new") };
        state.on_event(Event::Edited(edits(&[spec("old"), spec("b")], &[heir.clone(), spec("b")])), 1);
        let told =
            |state: &State| state.models[0].trouble.as_ref().map(|trouble| trouble.text.clone()).expect("a trouble");
        assert!(
            told(&state).contains("alias of `new`") && told(&state).contains("purge --model old"),
            "{}",
            told(&state)
        );
        assert!(state.is_known(0));
        // The alias is taken away again.
        state.on_event(Event::Edited(edits(&[heir], &[spec("new")])), 2);
        assert!(told(&state).contains("add it back"), "{}", told(&state));
        state.on_event(Event::Purge { model: Some("old".into()), before: 9 }, 3);
        assert!(!state.is_known(0) && state.is_known(1), "nothing is left of it");
    }

    #[test]
    fn a_load_of_an_entry_that_changed_is_broken_off() {
        let mut state = State::new(&[spec("a")], Knobs::default(), &BTreeMap::new(), 1);
        state.on_event(Event::Control(Control::Load("a".into())), 0);
        let effects = state.step(0);
        assert!(effects.iter().any(|e| matches!(e, Effect::Order { order: Order::Load, .. })), "{effects:?}");
        let edit = Edit {
            name: "a".into(),
            spec: Some(ModelSpec { args: vec!["x".into()], ..spec("a") }),
            keys: vec!["args"],
            restart: true,
        };
        let effects = state.on_event(Event::Edited(vec![edit]), 1);
        assert!(effects.iter().any(|e| matches!(e, Effect::Order { order: Order::Stop, .. })), "{effects:?}");
    }
}
