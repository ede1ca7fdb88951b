//! What a disk may hold after the power is cut, from a log of everything a process did to it.
//!
//! Promised by a disk: what was written to a file is there after the file was synced; names (made, renamed, removed) are
//! there after their folder was synced. All else may be there, in part, or not: any later write alone, a write in part (by
//! sectors), any first few changes of a folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Smallest piece that a disk writes whole.
const SECTOR: usize = 512;

/// One record of `disk.c`'s log. Ranges are places in the log.
#[derive(Clone, Debug)]
pub(crate) enum Record {
    Open {
        file: u32,
        path: PathBuf,
        created: bool,
        truncated: bool,
        is_folder: bool,
    },
    Write {
        file: u32,
        offset: usize,
        data: Range<usize>,
    },
    Truncate {
        file: u32,
        len: usize,
    },
    Allocate {
        file: u32,
        len: usize,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    MakeFolder {
        path: PathBuf,
    },
    RemoveFolder {
        path: PathBuf,
    },
    Sync {
        file: u32,
    },
    /// Something was said on stdout.
    Output {
        data: Range<usize>,
    },
}

/// A whole log.
pub(crate) struct Log {
    bytes: Vec<u8>,
    pub(crate) records: Vec<Record>,
}

impl Log {
    /// Reads a log; paths become relative to `folder`.
    pub(crate) fn read(log: &Path, folder: &Path) -> Self {
        let bytes = fs::read(log).unwrap();
        let mut records = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let number = |offset: usize, len: usize| {
                let mut le = [0_u8; 8];
                le[..len].copy_from_slice(&bytes[at + offset..at + offset + len]);
                usize::try_from(u64::from_le_bytes(le)).unwrap()
            };
            let (op, flags, paths_len, file) = (bytes[at], bytes[at + 1], number(2, 2), number(4, 4));
            let (offset, data_len) = (number(8, 8), number(16, 8));
            let paths_at = at + 24;
            let data = paths_at + paths_len..paths_at + paths_len + data_len;
            let mut paths = bytes[paths_at..paths_at + paths_len].split(|b| *b == 0).map(|path| {
                let path = Path::new(std::str::from_utf8(path).unwrap());
                path.strip_prefix(folder).unwrap_or(path).to_owned()
            });
            let mut path = || paths.next().unwrap();
            let file = u32::try_from(file).unwrap();
            records.push(match op {
                1 => Record::Open {
                    file,
                    path: path(),
                    created: flags & 1 != 0,
                    truncated: flags & 2 != 0,
                    is_folder: flags & 4 != 0,
                },
                2 => Record::Write { file, offset, data: data.clone() },
                3 => Record::Truncate { file, len: offset },
                4 => Record::Rename { from: path(), to: path() },
                5 => Record::Unlink { path: path() },
                6 => Record::Link { from: path(), to: path() },
                7 => Record::MakeFolder { path: path() },
                8 => Record::RemoveFolder { path: path() },
                9 => Record::Sync { file },
                10 => Record::Output { data: data.clone() },
                11 => Record::Allocate { file, len: offset },
                other => panic!("the log has a record of kind {other} at {at}"),
            });
            at = data.end;
        }
        Self { bytes, records }
    }

    /// The text of an [`Record::Output`].
    pub(crate) fn text(&self, data: &Range<usize>) -> &str {
        std::str::from_utf8(&self.bytes[data.clone()]).unwrap()
    }
}

/// How much of what was not synced is on the disk.
pub(crate) enum Torn<'a> {
    /// Nothing: the cache was lost whole.
    Nothing,
    /// Everything: the process was killed, and the machine went on.
    Everything,
    /// Anything.
    AtRandom(&'a mut Random),
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, data: Range<usize> },
    Truncate(usize),
    Allocate(usize),
}

/// A file's content: what is safe, and what came after.
#[derive(Clone, Debug, Default)]
struct Content {
    safe: Vec<u8>,
    later: Vec<Change>,
}

/// A name is one of a file (a place in `Disk::contents`) or of a folder.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Named {
    File(usize),
    Folder,
}

type Names = BTreeMap<PathBuf, Named>;

#[derive(Clone, Debug)]
enum Renaming {
    Add(PathBuf, Named),
    Remove(PathBuf),
    Move(PathBuf, PathBuf),
}

impl Renaming {
    fn folder(&self) -> PathBuf {
        let (Self::Add(path, _) | Self::Remove(path) | Self::Move(path, _)) = self;
        path.parent().unwrap_or(Path::new("")).to_owned()
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Add(path, named) => drop(names.insert(path.clone(), *named)),
            Self::Remove(path) => drop(names.remove(path)),
            Self::Move(from, to) => {
                // In a part of the changes, the name may never have been made.
                if let Some(named) = names.remove(from) {
                    names.insert(to.clone(), named);
                }
            }
        }
    }
}

/// A disk on which a log is played.
pub(crate) struct Disk<'a> {
    log: &'a Log,
    contents: Vec<Content>,
    /// As the process sees it.
    names: Names,
    safe_names: Names,
    later: Vec<Renaming>,
    files: HashMap<u32, usize>,
    folders: HashMap<u32, PathBuf>,
}

impl<'a> Disk<'a> {
    /// A disk that holds what is in the folder `before`, all of it safe.
    pub(crate) fn new(log: &'a Log, before: &Path) -> Self {
        let mut disk = Self {
            log,
            contents: Vec::new(),
            names: Names::from([(PathBuf::new(), Named::Folder)]),
            safe_names: Names::new(),
            later: Vec::new(),
            files: HashMap::new(),
            folders: HashMap::new(),
        };
        let mut folders = vec![before.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(before).unwrap().to_owned();
                if path.is_dir() {
                    disk.names.insert(name, Named::Folder);
                    folders.push(path);
                } else {
                    disk.contents.push(Content { safe: fs::read(&path).unwrap(), later: Vec::new() });
                    disk.names.insert(name, Named::File(disk.contents.len() - 1));
                }
            }
        }
        disk.safe_names = disk.names.clone();
        disk
    }

    /// Plays one record.
    pub(crate) fn play(&mut self, record: &Record) {
        match record {
            Record::Open { file, path, is_folder: true, .. } => drop(self.folders.insert(*file, path.clone())),
            Record::Open { file, path, created, truncated, .. } => self.open(*file, path, *created, *truncated),
            Record::Write { file, offset, data } => {
                self.change(*file, Change::Write { offset: *offset, data: data.clone() });
            }
            Record::Truncate { file, len } => self.change(*file, Change::Truncate(*len)),
            Record::Allocate { file, len } => self.change(*file, Change::Allocate(*len)),
            Record::Rename { from, to } => {
                assert_eq!(from.parent(), to.parent(), "a move from folder to folder is nothing this model knows");
                self.rename(Renaming::Move(from.clone(), to.clone()));
            }
            Record::Link { from, to } => self.rename(Renaming::Add(to.clone(), self.names[from])),
            Record::Unlink { path } | Record::RemoveFolder { path } => self.rename(Renaming::Remove(path.clone())),
            Record::MakeFolder { path } => self.rename(Renaming::Add(path.clone(), Named::Folder)),
            Record::Sync { file } => self.sync(*file),
            Record::Output { .. } => {}
        }
    }

    fn open(&mut self, file: u32, path: &Path, created: bool, truncated: bool) {
        if created {
            self.contents.push(Content::default());
            let content = self.contents.len() - 1;
            self.files.insert(file, content);
            self.rename(Renaming::Add(path.to_owned(), Named::File(content)));
        } else if let Some(Named::File(content)) = self.names.get(path) {
            // Names are given anew when the same file is opened again.
            self.files.insert(file, *content);
        } else {
            panic!("the log opens {}, which nothing has made", path.display());
        }
        if truncated {
            self.change(file, Change::Truncate(0));
        }
    }

    fn change(&mut self, file: u32, change: Change) {
        let content = self.files[&file];
        self.contents[content].later.push(change);
    }

    fn rename(&mut self, renaming: Renaming) {
        renaming.apply(&mut self.names);
        self.later.push(renaming);
    }

    fn sync(&mut self, file: u32) {
        if let Some(folder) = self.folders.get(&file) {
            let (now, later) = std::mem::take(&mut self.later).into_iter().partition(|r| r.folder() == *folder);
            self.later = later;
            for renaming in &now as &Vec<Renaming> {
                renaming.apply(&mut self.safe_names);
            }
            return;
        }
        let content = &mut self.contents[self.files[&file]];
        for change in std::mem::take(&mut content.later) {
            apply(&mut content.safe, &change, &self.log.bytes);
        }
    }

    /// Writes to the folder `to` what the disk holds if the power is cut now.
    pub(crate) fn cut(&self, to: &Path, mut torn: Torn<'_>) {
        let names = self.names_left(&mut torn);
        for (path, named) in &names {
            let ancestors: BTreeSet<&Path> = path.ancestors().skip(1).collect();
            if ancestors.iter().any(|folder| names.get(*folder) != Some(&Named::Folder)) {
                continue;
            }
            match named {
                Named::Folder => fs::create_dir_all(to.join(path)).unwrap(),
                Named::File(content) => {
                    fs::write(to.join(path), self.content_left(&self.contents[*content], &mut torn)).unwrap();
                }
            }
        }
    }

    fn names_left(&self, torn: &mut Torn<'_>) -> Names {
        let random = match torn {
            Torn::Nothing => return self.safe_names.clone(),
            Torn::Everything => return self.names.clone(),
            Torn::AtRandom(random) => random,
        };
        let mut names = self.safe_names.clone();
        let folders: BTreeSet<PathBuf> = self.later.iter().map(Renaming::folder).collect();
        for folder in folders {
            let changes: Vec<_> = self.later.iter().filter(|renaming| renaming.folder() == folder).collect();
            for renaming in &changes[..random.below(changes.len() + 1)] {
                renaming.apply(&mut names);
            }
        }
        names
    }

    fn content_left(&self, content: &Content, torn: &mut Torn<'_>) -> Vec<u8> {
        let mut bytes = content.safe.clone();
        let later = &content.later;
        let random = match torn {
            Torn::Nothing => return bytes,
            Torn::Everything => {
                later.iter().for_each(|change| apply(&mut bytes, change, &self.log.bytes));
                return bytes;
            }
            Torn::AtRandom(random) => random,
        };
        let how = random.below(5);
        let first = random.below(later.len() + 1);
        for (index, change) in later.iter().enumerate() {
            let is_kept = match how {
                0 => false,
                1 => true,
                2 => index < first,
                _ => random.below(2) == 0,
            };
            if how == 4
                && let Change::Write { offset, data } = change
            {
                // The file's blocks may have been given to it before they were written.
                for sector in sectors(*offset, data) {
                    if random.below(2) == 0 {
                        apply(&mut bytes, &sector, &self.log.bytes);
                    }
                }
            } else if is_kept {
                apply(&mut bytes, change, &self.log.bytes);
            }
        }
        bytes
    }
}

/// A write in pieces that begin at a sector's border, but for the first.
fn sectors(offset: usize, data: &Range<usize>) -> Vec<Change> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let len = (SECTOR - (offset + at) % SECTOR).min(data.len() - at);
        pieces.push(Change::Write { offset: offset + at, data: data.start + at..data.start + at + len });
        at += len;
    }
    pieces
}

fn apply(bytes: &mut Vec<u8>, change: &Change, log: &[u8]) {
    match change {
        Change::Write { offset, data } => {
            let end = offset + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset..end].copy_from_slice(&log[data.clone()]);
        }
        Change::Truncate(len) => bytes.resize(*len, 0),
        Change::Allocate(len) => bytes.resize((*len).max(bytes.len()), 0),
    }
}

/// Random numbers that a seed gives again (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number less than `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % (n.max(1) as u64)).unwrap()
    }
}

/// The seed of a test: `ROUNDHOUSE_TEST_SEED`, or another one each time. Printed, so that a failure can be had again.
pub(crate) fn seed(test: &str) -> u64 {
    let given = std::env::var("ROUNDHOUSE_TEST_SEED").ok();
    let mut bytes = [0_u8; 4];
    getrandom::fill(&mut bytes).unwrap();
    let seed = given.map_or_else(|| u64::from(u32::from_le_bytes(bytes)), |text| text.parse().unwrap());
    eprintln!("{test}: ROUNDHOUSE_TEST_SEED={seed}");
    seed
}
