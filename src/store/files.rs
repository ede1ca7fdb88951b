//! Files of jobs under `artifacts/`, beside the database: images, audio, and bodies and answers too large for a row. Each is
//! written, fsynced, renamed, and its folder fsynced before the row that names it is committed, so a row never points to
//! nothing; each is read with its checksum verified, so what is handed out is what was stored.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use object_store::ObjectStoreExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::StoreError;
use super::lost::LostFiles;
use super::space::Space;
use crate::domain::worker::Answer;
use crate::domain::{JobId, JobKind, Token};

/// Largest body or answer that is kept in a row; larger ones are files.
pub const INLINE_BYTES_MAX: usize = 32 * 1024;

/// What a file of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The submitted body.
    Request,
    /// The whole answer.
    Response,
    /// An image or audio of the answer.
    Artifact,
}

impl Role {
    /// As in the column `role`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Response => "response",
            Self::Artifact => "artifact",
        }
    }

    /// The role of a stored text.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Request, Self::Response, Self::Artifact].into_iter().find(|role| role.as_str() == text)
    }
}

/// A row of the table `file`, or one that is about to be.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredFile {
    /// What it is.
    pub role: Role,
    /// From 0 within the role.
    pub position: i64,
    /// For example `image-0.png`.
    pub name: String,
    /// For example `image/png`.
    pub mime: String,
    /// Size.
    pub bytes: u64,
    /// Hex.
    pub sha256: String,
    /// Under `artifacts/`.
    pub path: String,
}

impl StoredFile {
    /// How clients name it, if they may.
    pub fn artifact_id(&self) -> String {
        format!("art_{}", self.position)
    }
}

/// An answer whose files are on disk and not yet in the database.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredAnswer {
    /// HTTP status.
    pub status: u16,
    /// Of the whole answer.
    pub content_type: String,
    /// With images replaced by references; `None`: it is a file.
    pub body: Option<Bytes>,
    /// Token counts.
    pub usage: Option<Value>,
    /// In order.
    pub files: Vec<StoredFile>,
}

/// A job's body, as a claim finds it.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// In the row.
    Inline(Bytes),
    /// A file; [`super::read::Reader::load`] reads it.
    File(StoredFile),
}

/// The folder of files. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Files {
    pub(super) folder: Arc<std::path::PathBuf>,
    files: Arc<LocalFileSystem>,
    stored_bytes: Arc<AtomicU64>,
    space: Space,
    /// Part of the names of files; begins anywhere, so that no two runs of the server give the same.
    serial: Arc<AtomicU64>,
    /// Files that are known to be lost.
    pub(super) lost: LostFiles,
}

impl Files {
    /// Opens (and makes) the folder.
    pub(super) fn open(folder: &std::path::Path, stored_bytes: u64, space: Space) -> Result<Self, StoreError> {
        let in_folder = |source| StoreError::File { path: folder.display().to_string(), source };
        std::fs::create_dir_all(folder).map_err(in_folder)?;
        // The folder's own name has to outlive a power cut, too.
        let parent = folder.parent().unwrap_or(folder);
        std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(in_folder)?;
        let files = LocalFileSystem::new_with_prefix(folder)
            .map_err(|error| in_folder(std::io::Error::other(error)))?
            .with_fsync(true);
        Ok(Self {
            folder: Arc::new(folder.to_owned()),
            files: Arc::new(files),
            stored_bytes: Arc::new(AtomicU64::new(stored_bytes)),
            space,
            serial: Arc::new(AtomicU64::new(u64::from(getrandom::u32().unwrap_or_default()))),
            lost: LostFiles::default(),
        })
    }

    /// Bytes of all files that rows name, and of those that soon will be.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// The running count behind [`Self::stored_bytes`].
    pub(super) fn counter(&self) -> Arc<AtomicU64> {
        self.stored_bytes.clone()
    }

    /// Stores a body that is too large for a row; `None`: it is not.
    pub(super) async fn keep_request(&self, id: JobId, body: &Bytes) -> Result<Option<StoredFile>, StoreError> {
        if body.len() <= INLINE_BYTES_MAX {
            return Ok(None);
        }
        // Before it is written: what is left on the disk is for the answers of running jobs.
        if let Some(reason) = self.space.check() {
            return Err(StoreError::DiskFull(reason));
        }
        let token = Token { id, attempt: 0 };
        let name = "request.json".to_owned();
        Ok(Some(self.write(token, Role::Request, 0, name, "application/json", body.clone()).await?))
    }

    /// Takes the files out of an answer and stores them: all, or none.
    pub(super) async fn keep(&self, token: Token, kind: JobKind, answer: &Answer) -> Result<StoredAnswer, StoreError> {
        let mut stored = StoredAnswer {
            status: answer.status,
            content_type: answer.content_type.clone(),
            body: Some(answer.body.clone()),
            usage: answer.usage.clone(),
            files: Vec::new(),
        };
        match self.take_files(token, kind, answer, &mut stored).await {
            Ok(()) => Ok(stored),
            Err(error) => {
                self.delete(&stored.files).await;
                Err(error)
            }
        }
    }

    async fn take_files(
        &self,
        token: Token,
        kind: JobKind,
        answer: &Answer,
        stored: &mut StoredAnswer,
    ) -> Result<(), StoreError> {
        if !is_json(&answer.content_type) {
            let name = format!("{kind}-0.{}", extension(&answer.content_type));
            let file = self.write(token, Role::Artifact, 0, name, &answer.content_type, answer.body.clone()).await?;
            stored.files.push(file);
            stored.body = None;
            return Ok(());
        }
        if kind == JobKind::Image
            && let Ok(mut body) = serde_json::from_slice::<Value>(&answer.body)
        {
            self.take_images(token, &mut body, &mut stored.files).await?;
            stored.body = Some(Bytes::from(body.to_string()));
        }
        if let Some(body) = stored.body.take_if(|body| body.len() > INLINE_BYTES_MAX) {
            let name = "response.json".to_owned();
            stored.files.push(self.write(token, Role::Response, 0, name, &answer.content_type, body).await?);
        }
        Ok(())
    }

    async fn take_images(&self, token: Token, body: &mut Value, files: &mut Vec<StoredFile>) -> Result<(), StoreError> {
        let Some(images) = body.get_mut("data").and_then(Value::as_array_mut) else {
            return Ok(());
        };
        for image in images {
            let Some(bytes) = image.get("b64_json").and_then(Value::as_str).and_then(|text| BASE64.decode(text).ok())
            else {
                continue;
            };
            let mime = image_type(&bytes);
            let position = files.len();
            let name = format!("image-{position}.{}", extension(mime));
            let file = self.write(token, Role::Artifact, position, name, mime, Bytes::from(bytes)).await?;
            image["b64_json"] = serde_json::json!({"$artifact": file.artifact_id()});
            files.push(file);
        }
        Ok(())
    }

    async fn write(
        &self,
        token: Token,
        role: Role,
        position: usize,
        name: String,
        mime: &str,
        bytes: Bytes,
    ) -> Result<StoredFile, StoreError> {
        // The attempt is in the path: a late writer of an old attempt never touches the file of the one that won. So is a
        // serial number: neither does a second result of the same attempt.
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let path = format!("{}/{}-{}-{serial:x}-{name}", folder_of(token.id.number), token.id.uuid(), token.attempt);
        let size = bytes.len() as u64;
        let sha256 = hex(&Sha256::digest(&bytes));
        let place = Path::from(path.as_str());
        let mut put = self.files.put(&place, bytes.clone().into()).await;
        if put.as_ref().is_err_and(is_full) && self.space.give_up_reserve() {
            put = self.files.put(&place, bytes.into()).await;
        }
        put.map_err(|error| file_error(&path, error))?;
        self.stored_bytes.fetch_add(size, Ordering::Relaxed);
        let position = i64::try_from(position).unwrap_or(i64::MAX);
        Ok(StoredFile { role, position, name, mime: mime.to_owned(), bytes: size, sha256, path })
    }

    /// Reads a file whole and compares its checksum.
    pub(super) async fn read(&self, file: &StoredFile) -> Result<Bytes, StoreError> {
        let path = Path::from(file.path.as_str());
        let got = self.files.get(&path).await.map_err(|error| file_error(&file.path, error))?;
        let bytes = got.bytes().await.map_err(|error| file_error(&file.path, error))?;
        if hex(&Sha256::digest(&bytes)) == file.sha256 {
            return Ok(bytes);
        }
        Err(StoreError::Damaged { path: format!("artifacts/{}", file.path) })
    }

    /// Deletes files that no row names; those that are gone already are no error. Returns those that could not be deleted,
    /// and why: the collection of files without rows comes for them.
    pub(super) async fn delete(&self, files: &[StoredFile]) -> Vec<(String, object_store::Error)> {
        let mut failed = Vec::new();
        for file in files {
            let less = |bytes: u64| Some(bytes.saturating_sub(file.bytes));
            let _ = self.stored_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            match self.files.delete(&Path::from(file.path.as_str())).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => failed.push((file.path.clone(), error)),
            }
        }
        failed
    }

    /// Puts images back where references stand.
    pub(super) async fn inline(&self, body: Bytes, files: &[StoredFile]) -> Result<Bytes, StoreError> {
        if !files.iter().any(|file| file.role == Role::Artifact) {
            return Ok(body);
        }
        let Ok(mut json) = serde_json::from_slice::<Value>(&body) else {
            return Ok(body);
        };
        let Some(images) = json.get_mut("data").and_then(Value::as_array_mut) else {
            return Ok(body);
        };
        for image in images {
            let Some(id) = image.pointer("/b64_json/$artifact").and_then(Value::as_str) else {
                continue;
            };
            let Some(file) = files.iter().find(|file| file.role == Role::Artifact && file.artifact_id() == id) else {
                return Err(StoreError::Database(format!("the answer names {id}, which is not stored")));
            };
            let bytes = self.read(file).await?;
            image["b64_json"] = Value::String(BASE64.encode(bytes));
        }
        Ok(Bytes::from(json.to_string()))
    }
}

/// The folder under `artifacts/` of a job's files.
pub(super) fn folder_of(number: i64) -> String {
    format!("{:05}", number / 1_000)
}

/// Whether the disk has no room.
fn is_full(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            return error.kind() == std::io::ErrorKind::StorageFull;
        }
        cause = error.source();
    }
    false
}

fn file_error(path: &str, error: object_store::Error) -> StoreError {
    let source = match error {
        object_store::Error::NotFound { .. } => std::io::Error::new(std::io::ErrorKind::NotFound, "the file is gone"),
        // Some of its errors hold the system's own, which says more.
        other => std::io::Error::other(other),
    };
    StoreError::File { path: format!("artifacts/{path}"), source }
}

fn is_json(content_type: &str) -> bool {
    content_type.starts_with("application/json")
}

fn image_type(bytes: &[u8]) -> &'static str {
    match bytes {
        [0x89, b'P', b'N', b'G', ..] => "image/png",
        [0xff, 0xd8, ..] => "image/jpeg",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "image/webp",
        _ => "application/octet-stream",
    }
}

fn extension(content_type: &str) -> &'static str {
    match content_type.split(';').next().unwrap_or_default().trim() {
        "image/png" => "png",
        "image/jpeg" => "jpg",
        "image/webp" => "webp",
        "audio/wav" | "audio/x-wav" => "wav",
        "audio/flac" => "flac",
        "audio/mpeg" => "mp3",
        "audio/ogg" | "audio/opus" => "opus",
        "audio/pcm" => "pcm",
        _ => "bin",
    }
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn images_leave_the_answer_and_come_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = Files::open(dir.path(), 0, Space::unlimited()).unwrap();
        let token = Token { id: JobId::new(1, 2, 3), attempt: 1 };
        let png = BASE64.encode([0x89, b'P', b'N', b'G', 1, 2, 3]);
        let body = serde_json::json!({"created": 1, "data": [{"b64_json": png}, {"b64_json": png}]}).to_string();
        let answer = Answer {
            status: 200,
            content_type: "application/json".into(),
            body: Bytes::from(body.clone()),
            usage: None,
        };
        let stored = store.keep(token, JobKind::Image, &answer).await.unwrap();
        assert_eq!(stored.files.len(), 2);
        assert_eq!(stored.files[1].name, "image-1.png");
        let kept = stored.body.unwrap();
        assert!(!kept.windows(png.len()).any(|w| w == png.as_bytes()), "images are not kept twice");
        assert_eq!(store.inline(kept, &stored.files).await.unwrap(), body);
        assert_eq!(store.stored_bytes(), 14);
        assert!(store.delete(&stored.files).await.is_empty());
        assert!(store.delete(&stored.files[..1]).await.is_empty(), "gone is gone");
        assert_eq!(store.stored_bytes(), 0);
    }

    #[tokio::test]
    async fn a_damaged_file_is_told_by_name_and_a_missing_one_too() {
        let dir = tempfile::tempdir().unwrap();
        let store = Files::open(dir.path(), 0, Space::unlimited()).unwrap();
        let body = Bytes::from(vec![b'x'; INLINE_BYTES_MAX + 1]);
        assert!(store.keep_request(JobId::new(1, 2, 3), &body.slice(1..)).await.unwrap().is_none());
        let file = store.keep_request(JobId::new(1, 2, 3), &body).await.unwrap().unwrap();
        assert_eq!(store.read(&file).await.unwrap(), body);
        let mut changed = body.to_vec();
        changed[7] ^= 1;
        std::fs::write(dir.path().join(&file.path), changed).unwrap();
        let error = store.read(&file).await.unwrap_err();
        assert!(matches!(&error, StoreError::Damaged { path } if path.contains(&file.path)), "{error}");
        std::fs::remove_file(dir.path().join(&file.path)).unwrap();
        let error = store.read(&file).await.unwrap_err();
        assert!(error.is_lost_file() && error.to_string().contains(&file.path), "{error}");
    }

    #[tokio::test]
    async fn audio_is_one_file_and_no_body() {
        let dir = tempfile::tempdir().unwrap();
        let store = Files::open(dir.path(), 0, Space::unlimited()).unwrap();
        let token = Token { id: JobId::new(1, 2, 3), attempt: 1 };
        let answer =
            Answer { status: 200, content_type: "audio/wav".into(), body: Bytes::from_static(b"RIFF"), usage: None };
        let stored = store.keep(token, JobKind::Audio, &answer).await.unwrap();
        assert_eq!((stored.body, stored.files[0].name.as_str()), (None, "audio-0.wav"));
    }
}
