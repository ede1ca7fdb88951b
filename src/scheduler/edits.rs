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
        let mut effects = Vec::new();
        for Edit { name, spec, keys, restart } in edits {
            let index = self.index_of(name).unwrap_or_else(|| self.add_model(name));
            let model = &mut self.models[index];
            let what = match spec {
                Some(spec) => {
                    let was_listed = model.is_listed;
                    model.take_entry(spec, *restart);
                    if was_listed { "changed" } else { "added" }
                }
                None => {
                    model.lose_entry();
                    "removed"
                }
            };
            if *restart {
                self.look_for_weights_again(index);
                // What loads would come to is not wanted any more.
                self.unload(index, true, now, &mut effects);
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
        self.note_all_devices();
        self.plan_now = true;
        effects
    }

    /// Takes other knobs and another budget for parked workers, in bytes.
    pub fn set_knobs(&mut self, knobs: Knobs, park_bytes: u64) {
        self.knobs = knobs;
        self.inventory.host = park_bytes;
        self.plan_now = true;
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
