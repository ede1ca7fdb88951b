//! Whether the weights of a model lie in the Hugging Face cache. The folder is the one in which `roundhouse_worker.weights`
//! looks; what makes a snapshot whole is said at [`has`]. No network; blocking.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Where RunPod mounts the volume that outlives a pod.
const POD_VOLUME: &str = "/workspace";
/// Here the fetcher notes, by their commits, which snapshots it has fetched whole.
const COMPLETE: &str = ".roundhouse-complete";
/// Ends of files with weights, in any format.
const WEIGHTS: [&str; 8] = [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5"];
/// Ends of files in `blobs` that are on their way: of huggingface_hub, and of our fetcher.
const UNFINISHED: [&str; 2] = [".incomplete", ".roundhouse-partial"];
/// Deepest folder within a snapshot that is looked into.
const DEPTH_MAX: usize = 16;

/// The cache's folder, by a process's environment; `None` if that does not even name a home folder.
pub(super) fn folder(var: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let var = |name: &str| var(name).filter(|value| !value.is_empty());
    let home = var("HOME").map(PathBuf::from).or_else(std::env::home_dir);
    let expand = |path: OsString| match (path.to_str().and_then(|text| text.strip_prefix("~")), &home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(path),
    };
    if let Some(cache) = var("HF_HUB_CACHE") {
        return Some(expand(cache));
    }
    let on_pod = || var("RUNPOD_POD_ID").filter(|_| Path::new(POD_VOLUME).is_dir());
    let hugging_face = var("HF_HOME")
        .map(&expand)
        .or_else(|| on_pod().map(|_| Path::new(POD_VOLUME).join(".cache/huggingface")))
        .or_else(|| var("XDG_CACHE_HOME").map(|cache| expand(cache).join("huggingface")))
        .or_else(|| home.as_ref().map(|home| home.join(".cache/huggingface")))?;
    Some(hugging_face.join("hub"))
}

/// Whether `repository` is whole in `cache` at `revision` (a branch, tag or commit; `main` if none is named), where a worker
/// finds it that is told the same: every file of the snapshot is there, and either our fetcher has noted that these are all, or, for what
/// another program has fetched, nothing is on its way, there are files with weights, and all that their indexes name.
pub(super) fn has(cache: &Path, repository: &str, revision: Option<&str>) -> bool {
    let folder = cache.join(format!("models--{}", repository.replace('/', "--")));
    let name = revision.unwrap_or("main");
    let commit = std::fs::read_to_string(folder.join("refs").join(name)).unwrap_or_else(|_| name.to_owned());
    let commit = commit.trim();
    if commit.is_empty() {
        return false;
    }
    let snapshot = folder.join("snapshots").join(commit);
    let mut files = Vec::new();
    if !list(&snapshot, DEPTH_MAX, &mut files) || files.is_empty() {
        return false;
    }
    folder.join(COMPLETE).join(commit).is_file() || looks_whole(&folder, &files)
}

/// All files below `folder`; false if one cannot be read, as a link to nothing.
fn list(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.into_iter().all(|entry| {
        let Ok(path) = entry.map(|entry| entry.path()) else { return false };
        // Follows links.
        match std::fs::metadata(&path) {
            Ok(what) if what.is_dir() => depth > 0 && list(&path, depth - 1, found),
            Ok(_) => {
                found.push(path);
                true
            }
            Err(_) => false,
        }
    })
}

fn looks_whole(folder: &Path, files: &[PathBuf]) -> bool {
    let ends = |path: &Path, ends: &[&str]| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        ends.iter().any(|end| name.ends_with(end))
    };
    let blobs = std::fs::read_dir(folder.join("blobs")).into_iter().flatten().flatten();
    let nothing_comes = blobs.into_iter().all(|blob| !ends(&blob.path(), &UNFINISHED));
    let parts_are_there = |index: &Path| {
        let text = std::fs::read_to_string(index).unwrap_or_default();
        let index_json: Value = serde_json::from_str(&text).unwrap_or_default();
        let parts = index_json.get("weight_map").and_then(Value::as_object);
        let mut names = parts.into_iter().flat_map(|parts| parts.values()).filter_map(Value::as_str);
        names.all(|name| index.with_file_name(name).exists())
    };
    nothing_comes
        && files.iter().any(|file| ends(file, &WEIGHTS))
        && files.iter().filter(|file| ends(file, &[".safetensors.index.json"])).all(|index| parts_are_there(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_of(vars: &[(&str, &str)]) -> PathBuf {
        folder(|name| vars.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())).unwrap()
    }

    #[test]
    fn the_folder_is_where_workers_look() {
        assert_eq!(folder_of(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]), Path::new("/c"));
        assert_eq!(folder_of(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/h/hub"));
        assert_eq!(folder_of(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "")]), Path::new("/x/huggingface/hub"));
        assert_eq!(folder_of(&[("HOME", "/root")]), Path::new("/root/.cache/huggingface/hub"));
        assert_eq!(folder_of(&[("HOME", "/root"), ("HF_HOME", "~/hf")]), Path::new("/root/hf/hub"));
    }

    /// A cache with one repository at commit `abc`, as huggingface_hub lays it out.
    struct Cache(tempfile::TempDir);

    impl Cache {
        fn new(files: &[(&str, &str)]) -> Self {
            let cache = Self(tempfile::tempdir().unwrap());
            cache.write("refs/main", "abc\n");
            for (name, text) in files {
                let blob = format!("blobs/{}", name.replace('/', "-"));
                cache.write(&blob, text);
                let link = cache.path(&format!("snapshots/abc/{name}"));
                std::fs::create_dir_all(link.parent().unwrap()).unwrap();
                std::os::unix::fs::symlink(cache.path(&blob), link).unwrap();
            }
            cache
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join("models--org--m").join(name)
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
            std::fs::write(self.path(name), text).unwrap();
        }

        fn has(&self, revision: Option<&str>) -> bool {
            has(self.0.path(), "org/m", revision)
        }
    }

    #[test]
    fn what_another_program_has_fetched_counts_if_it_looks_whole() {
        let whole = Cache::new(&[("config.json", "{}"), ("unet/model.safetensors", "w")]);
        assert!(whole.has(None) && whole.has(Some("main")) && whole.has(Some("abc")));
        assert!(!whole.has(Some("v2")), "of another revision nothing is known");
        assert!(!has(whole.0.path(), "org/other", None));
        whole.write("blobs/x.incomplete", "");
        assert!(!whole.has(None), "more is on its way");

        assert!(!Cache::new(&[("config.json", "{}")]).has(None), "no weights");
        let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
        let parts = Cache::new(&[("m.safetensors.index.json", index), ("m-1.safetensors", "w")]);
        assert!(!parts.has(None), "a part is missing");
        let parts =
            Cache::new(&[("m.safetensors.index.json", index), ("m-1.safetensors", "w"), ("m-2.safetensors", "w")]);
        assert!(parts.has(None));
        std::fs::remove_file(parts.path("blobs/m-2.safetensors")).unwrap();
        assert!(!parts.has(None), "a link to nothing");
    }

    #[test]
    fn what_the_fetcher_has_noted_counts_whatever_else_is_on_its_way() {
        let cache = Cache::new(&[("config.json", "{}")]);
        cache.write(".roundhouse-complete/abc", "");
        cache.write("blobs/of-another-revision.roundhouse-partial", "");
        assert!(cache.has(None));
        std::fs::remove_file(cache.path("blobs/config.json")).unwrap();
        assert!(!cache.has(None), "somebody has deleted a file");
    }

    #[test]
    fn each_revision_is_there_or_not_by_itself() {
        let cache = Cache::new(&[("a.safetensors", "w")]);
        cache.write("refs/v1", "abc");
        cache.write("refs/v2", "def");
        assert!(cache.has(Some("v1")));
        assert!(!cache.has(Some("v2")), "nothing of its commit is here");
        cache.write("refs/main", "def");
        assert!(cache.has(Some("v1")) && cache.has(Some("abc")), "a worker that is told so finds it");
        assert!(!cache.has(None));
    }
}
