//! On what kind of file system a path lies, and whether a database may live there.
//!
//! SQLite relies on locks and syncs that network file systems promise and do not always keep; what lies on a container's own
//! disk is gone with the container. Both are found out before the database is opened, and said.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::StoreError;

/// What a file system is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A disk of this machine.
    Local,
    /// Local, and gone when the pod, the container or the machine stops.
    Volatile,
    /// Somebody else's disk, or a program in between.
    Network,
    /// Not known; taken for a local one.
    Unknown,
}

/// A file system by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// For example `ext4`, `NFS`.
    pub name: Cow<'static, str>,
    /// What it is to us.
    pub class: Class,
}

/// `f_type` of statfs(2), the word of it in `ROUNDHOUSE_STATFS`, the name shown.
const KNOWN: &[(u32, &str, &str, Class)] = &[
    (0x0000_ef53, "ext4", "ext4", Class::Local),
    (0x5846_5342, "xfs", "XFS", Class::Local),
    (0x9123_683e, "btrfs", "btrfs", Class::Local),
    (0x2fc1_2fc1, "zfs", "ZFS", Class::Local),
    (0xf2f5_2010, "f2fs", "F2FS", Class::Local),
    (0xca45_1a4e, "bcachefs", "bcachefs", Class::Local),
    (0x0000_4d44, "vfat", "FAT", Class::Local),
    (0x2011_bab0, "exfat", "exFAT", Class::Local),
    (0x7366_746e, "ntfs3", "NTFS", Class::Local),
    (0x794c_7630, "overlay", "overlay", Class::Volatile),
    (0x0102_1994, "tmpfs", "tmpfs", Class::Volatile),
    (0x8584_58f6, "ramfs", "ramfs", Class::Volatile),
    (0x0000_6969, "nfs", "NFS", Class::Network),
    // Also virtiofs and most volumes of clouds.
    (0x6573_5546, "fuse", "FUSE", Class::Network),
    (0xff53_4d42, "cifs", "CIFS", Class::Network),
    (0xfe53_4d42, "smb2", "SMB", Class::Network),
    (0x0000_517b, "smb", "SMB", Class::Network),
    (0x0102_1997, "9p", "9p", Class::Network),
    (0x0bd0_0bd0, "lustre", "Lustre", Class::Network),
    (0x4750_4653, "gpfs", "GPFS", Class::Network),
    (0x5346_414f, "afs", "AFS", Class::Network),
    (0x6b41_4653, "kafs", "AFS", Class::Network),
    (0x00c3_6400, "ceph", "Ceph", Class::Network),
    (0x1983_0326, "beegfs", "BeeGFS", Class::Network),
    (0xaad7_aaea, "panfs", "PanFS", Class::Network),
    (0x2003_0528, "orangefs", "OrangeFS", Class::Network),
    (0x7461_636f, "ocfs2", "OCFS2", Class::Network),
    (0x0116_1970, "gfs2", "GFS2", Class::Network),
    (0x7375_7245, "coda", "Coda", Class::Network),
    (0x0000_564c, "ncp", "NCP", Class::Network),
    (0x786f_4256, "vboxsf", "vboxsf", Class::Network),
    (0x7c7c_6673, "prl_fs", "prl_fs", Class::Network),
];

impl FileSystem {
    /// By the number that statfs(2) gives.
    pub fn of_magic(magic: u32) -> Self {
        match KNOWN.iter().find(|(known, ..)| *known == magic) {
            Some((_, _, name, class)) => Self { name: Cow::Borrowed(name), class: *class },
            None => Self { name: Cow::Owned(format!("unknown (0x{magic:x})")), class: Class::Unknown },
        }
    }

    /// Whether what lies on it outlives the pod, the container or a restart of the machine, as far as can be told.
    pub fn is_persistent(&self) -> bool {
        self.class != Class::Volatile
    }
}

/// Asks for the `f_type` of an existing path.
pub type Statfs = Arc<dyn Fn(&Path) -> std::io::Result<u32> + Send + Sync>;

/// Finds file systems. Cheap to clone.
#[derive(Clone)]
pub struct FileSystems {
    statfs: Statfs,
}

impl FileSystems {
    /// The system's own.
    pub fn real() -> Self {
        Self { statfs: Arc::new(magic) }
    }

    /// With another answer to statfs(2).
    pub fn asking(statfs: Statfs) -> Self {
        Self { statfs }
    }

    /// From `ROUNDHOUSE_STATFS`, for tests of the whole program: `/path=nfs,/other=fuse`; what lies under none of these is
    /// asked for as usual. Unset or empty: the system's own.
    pub fn from_setting(setting: Option<&str>) -> Result<Self, String> {
        let mut told: Vec<(PathBuf, u32)> = Vec::new();
        for pair in setting.unwrap_or_default().split(',').filter(|pair| !pair.trim().is_empty()) {
            let (path, word) = pair.rsplit_once('=').ok_or_else(|| format!("`{pair}` is not PATH=KIND"))?;
            let known = KNOWN.iter().find(|(_, known, ..)| *known == word.trim());
            let words = || KNOWN.iter().map(|(_, word, ..)| *word).collect::<Vec<_>>().join(", ");
            let (magic, ..) = known.ok_or_else(|| format!("`{word}` is no kind; there are {}", words()))?;
            told.push((PathBuf::from(path.trim()), *magic));
        }
        if told.is_empty() {
            return Ok(Self::real());
        }
        // The most special path wins.
        told.sort_by_key(|(path, _)| std::cmp::Reverse(path.components().count()));
        Ok(Self::asking(Arc::new(move |path| match told.iter().find(|(told, _)| path.starts_with(told)) {
            Some((_, magic)) => Ok(*magic),
            None => magic_of_existing(path),
        })))
    }

    /// Of a path, or of the folder that it would be made in.
    pub fn of(&self, path: &Path) -> std::io::Result<FileSystem> {
        let absolute = std::path::absolute(path)?;
        // A path that is told about need not be there; one that is asked for has to be.
        Ok(FileSystem::of_magic(match (self.statfs)(&absolute) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (self.statfs)(&existing(&absolute))?,
            answer => answer?,
        }))
    }
}

fn magic(path: &Path) -> std::io::Result<u32> {
    let stat = nix::sys::statfs::statfs(path)?;
    // The field's type differs between machines; the numbers have 32 bits.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "only the low 32 bits mean something")]
    Ok(stat.filesystem_type().0 as u32)
}

fn magic_of_existing(path: &Path) -> std::io::Result<u32> {
    magic(&existing(path))
}

/// The path, or the nearest folder above it that exists.
pub fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Bytes that an ordinary user may still write where `path` lies or would be made.
pub fn free_bytes(path: &Path) -> Option<u64> {
    super::space::free_bytes(&existing(path))
}

/// Where a database may live, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where the data dir lies.
    pub file_system: FileSystem,
    /// Only one connection may be used.
    pub exclusive: bool,
    /// What a person should know.
    pub warning: Option<String>,
}

/// Decides whether the data dir `dir` may hold a database. On a network file system it may not, unless that is allowed
/// (`--allow-network-fs`: one connection, and nobody else's) or snapshots are kept elsewhere.
pub fn place(
    dir: &Path,
    snapshot_dir: Option<&Path>,
    allow_network: bool,
    file_systems: &FileSystems,
) -> Result<Placement, StoreError> {
    if dir.is_file() {
        let help = "is a file, not a folder; name a folder for the data dir with --data-dir (ROUNDHOUSE_DATA_DIR)";
        return Err(StoreError::Unusable(format!("{} {help}", dir.display())));
    }
    let found = file_systems.of(dir);
    let file_system = found.map_err(|source| StoreError::File { path: dir.display().to_string(), source })?;
    let (shown, name) = (dir.display(), &file_system.name);
    let has_snapshots = snapshot_dir.is_some();
    let mut exclusive = false;
    let warning = match file_system.class {
        Class::Network if has_snapshots => Some(format!(
            "the data dir {shown} lies on {name}, a network file system, which may lose or damage the database; only the \
             snapshots count. Better put --data-dir on a local disk and keep --snapshot-dir there"
        )),
        Class::Network if allow_network => {
            exclusive = true;
            Some(format!(
                "the data dir {shown} lies on {name}, a network file system (allowed by --allow-network-fs): one connection \
                 does everything, so reads wait for writes, and `roundhouse backup` works only while the server is stopped"
            ))
        }
        Class::Network => {
            return Err(StoreError::Unusable(format!(
                "the data dir {shown} lies on {name}, a network file system, where a database may be lost or damaged: give \
                 --data-dir (ROUNDHOUSE_DATA_DIR) a folder on a local disk, and if that disk does not outlive the machine, \
                 keep copies on the network with --snapshot-dir DIR. To use it all the same, with one connection and slow: \
                 --allow-network-fs (ROUNDHOUSE_ALLOW_NETWORK_FS=true)"
            )));
        }
        Class::Volatile if !has_snapshots => Some(format!(
            "the data dir {shown} lies on {name}: all jobs are gone when the pod, the container or the machine stops; keep \
             copies on a volume that stays with --snapshot-dir DIR, or put --data-dir on a persistent local disk"
        )),
        Class::Unknown => {
            Some(format!("the file system of the data dir {shown} is {name}; it is taken for a local disk"))
        }
        Class::Local | Class::Volatile => None,
    };
    Ok(Placement { file_system, exclusive, warning })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn always(magic: u32) -> FileSystems {
        FileSystems::asking(Arc::new(move |_| Ok(magic)))
    }

    fn placed(magic: u32, snapshot_dir: Option<&str>, allow: bool) -> Result<Placement, String> {
        place(Path::new("/some/data"), snapshot_dir.map(Path::new), allow, &always(magic))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn network_file_systems_are_refused_with_what_to_do() {
        let networks = [
            0x6969,
            0x6573_5546,
            0xff53_4d42,
            0xfe53_4d42,
            0x517b,
            0x0102_1997,
            0x0bd0_0bd0,
            0x4750_4653,
            0x5346_414f,
            0x00c3_6400,
        ];
        for magic in networks {
            let refusal = placed(magic, None, false).unwrap_err();
            for word in ["/some/data", "--data-dir", "--snapshot-dir", "--allow-network-fs"] {
                assert!(refusal.contains(word), "{magic:x}: {refusal}");
            }
        }
        assert!(placed(0x6969, None, false).unwrap_err().contains("lies on NFS"));
    }

    #[test]
    fn allowed_on_a_network_there_is_one_connection() {
        let placement = placed(0x6573_5546, None, true).unwrap();
        assert!(placement.exclusive && placement.warning.unwrap().contains("FUSE"));
        let placement = placed(0xef53, None, true).unwrap();
        assert_eq!((placement.exclusive, placement.warning), (false, None), "a local disk needs no such care");
    }

    #[test]
    fn with_snapshots_a_network_is_warned_of_and_read_as_usual() {
        for allow in [false, true] {
            let placement = placed(0x6969, Some("/nfs/snapshots"), allow).unwrap();
            assert!(!placement.exclusive && placement.warning.unwrap().contains("only the snapshots count"));
        }
    }

    #[test]
    fn what_goes_with_the_pod_is_said_unless_there_are_snapshots() {
        for magic in [0x794c_7630, 0x0102_1994] {
            let placement = placed(magic, None, false).unwrap();
            assert!(!placement.file_system.is_persistent() && !placement.exclusive);
            assert!(placement.warning.unwrap().contains("gone when the pod"));
            assert_eq!(placed(magic, Some("/volume"), false).unwrap().warning, None);
        }
        assert_eq!(placed(0x5846_5342, None, false).unwrap().warning, None);
        assert!(placed(0xabcd_ef01, None, false).unwrap().warning.unwrap().contains("unknown (0xabcdef01)"));
    }

    #[test]
    fn a_setting_tells_file_systems_of_paths_and_the_most_special_one_wins() {
        let file_systems = FileSystems::from_setting(Some("/a=nfs, /a/b=ext4,/c=9p")).unwrap();
        let name = |path: &str| file_systems.of(Path::new(path)).unwrap().name.into_owned();
        assert_eq!((name("/a/x"), name("/a/b/x"), name("/c")), ("NFS".to_owned(), "ext4".to_owned(), "9p".to_owned()));
        assert_eq!(name("/proc/1"), name("/proc"));
        assert!(FileSystems::from_setting(Some("/a=floppy")).err().unwrap().contains("no kind; there are ext4"));
        assert!(FileSystems::from_setting(Some("nonsense")).is_err());
    }

    #[test]
    fn a_path_that_is_not_there_yet_lies_where_it_would_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let real = FileSystems::real();
        assert_eq!(real.of(&dir.path().join("not/yet")).unwrap(), real.of(dir.path()).unwrap());
        assert!(free_bytes(&dir.path().join("not/yet")).is_some());
    }
}
