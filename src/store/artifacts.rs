//! Images and audio as files under `artifacts/`, beside the database: written, fsynced and renamed before the row that
//! names them is committed, so a row never points to nothing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::StoreError;
use super::read::Artifact;
use crate::domain::worker::Answer;
use crate::domain::{JobKind, Token};

/// A file that is on disk and not yet in the database.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredArtifact {
    /// As shown.
    pub artifact: Artifact,
    /// Under `artifacts/`.
    pub path: String,
}

/// What the `result` row holds of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredAnswer {
    /// HTTP status.
    pub status: u16,
    /// Of the whole answer.
    pub content_type: String,
    /// With images replaced by references; `None`: the one artifact is the body.
    pub body: Option<Bytes>,
    /// Token counts.
    pub usage: Option<Value>,
    /// Files, in order.
    pub artifacts: Vec<StoredArtifact>,
}

/// The folder of artifacts.
#[derive(Debug, Clone)]
pub(super) struct Artifacts {
    files: std::sync::Arc<LocalFileSystem>,
}

impl Artifacts {
    /// Opens (and makes) the folder.
    pub(super) fn open(folder: &std::path::Path) -> Result<Self, StoreError> {
        let in_folder = |source| StoreError::File { path: folder.display().to_string(), source };
        std::fs::create_dir_all(folder).map_err(in_folder)?;
        let files = LocalFileSystem::new_with_prefix(folder)
            .map_err(|error| in_folder(std::io::Error::other(error)))?
            .with_fsync(true);
        Ok(Self { files: std::sync::Arc::new(files) })
    }

    /// Takes the files out of an answer and stores them.
    pub(super) async fn keep(&self, token: Token, kind: JobKind, answer: &Answer) -> Result<StoredAnswer, StoreError> {
        let mut stored = StoredAnswer {
            status: answer.status,
            content_type: answer.content_type.clone(),
            body: Some(answer.body.clone()),
            usage: answer.usage.clone(),
            artifacts: Vec::new(),
        };
        if !is_json(&answer.content_type) {
            let name = format!("{kind}-0.{}", extension(&answer.content_type));
            stored.artifacts.push(self.write(token, 0, name, &answer.content_type, answer.body.clone()).await?);
            stored.body = None;
        } else if kind == JobKind::Image
            && let Ok(mut body) = serde_json::from_slice::<Value>(&answer.body)
        {
            self.take_images(token, &mut body, &mut stored.artifacts).await?;
            stored.body = Some(Bytes::from(body.to_string()));
        }
        Ok(stored)
    }

    async fn take_images(
        &self,
        token: Token,
        body: &mut Value,
        artifacts: &mut Vec<StoredArtifact>,
    ) -> Result<(), StoreError> {
        let Some(images) = body.get_mut("data").and_then(Value::as_array_mut) else {
            return Ok(());
        };
        for image in images {
            let Some(bytes) = image.get("b64_json").and_then(Value::as_str).and_then(|text| BASE64.decode(text).ok())
            else {
                continue;
            };
            let mime = image_type(&bytes);
            let position = artifacts.len();
            let name = format!("image-{position}.{}", extension(mime));
            let file = self.write(token, position, name, mime, Bytes::from(bytes)).await?;
            image["b64_json"] = serde_json::json!({"$artifact": file.artifact.id});
            artifacts.push(file);
        }
        Ok(())
    }

    async fn write(
        &self,
        token: Token,
        position: usize,
        name: String,
        mime: &str,
        bytes: Bytes,
    ) -> Result<StoredArtifact, StoreError> {
        // The attempt is in the path: a late writer of an old attempt never touches the file of the one that won.
        let path = format!("{:05}/{}-{}-{name}", token.id.number / 1_000, token.id.uuid(), token.attempt);
        let artifact = Artifact {
            id: format!("art_{position}"),
            name,
            mime: mime.to_owned(),
            bytes: bytes.len() as u64,
            sha256: hex(&Sha256::digest(&bytes)),
        };
        self.files.put(&Path::from(path.as_str()), bytes.into()).await.map_err(|error| file_error(&path, error))?;
        Ok(StoredArtifact { artifact, path })
    }

    /// Reads a file, or a part of it (end exclusive).
    pub(super) async fn read(&self, path: &str, range: Option<(u64, u64)>) -> Result<Bytes, StoreError> {
        let options =
            GetOptions { range: range.map(|(start, end)| GetRange::Bounded(start..end)), ..GetOptions::default() };
        let got = self.files.get_opts(&Path::from(path), options).await.map_err(|error| file_error(path, error))?;
        got.bytes().await.map_err(|error| file_error(path, error))
    }

    /// Puts images back where references stand.
    pub(super) async fn inline(&self, body: Bytes, files: &[(Artifact, String)]) -> Result<Bytes, StoreError> {
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
            let Some((_, path)) = files.iter().find(|(artifact, _)| artifact.id == id) else {
                return Err(StoreError::Database(format!("the answer names {id}, which is not stored")));
            };
            let bytes = self.read(path, None).await?;
            image["b64_json"] = Value::String(BASE64.encode(bytes));
        }
        Ok(Bytes::from(json.to_string()))
    }
}

fn file_error(path: &str, error: object_store::Error) -> StoreError {
    StoreError::File { path: format!("artifacts/{path}"), source: std::io::Error::other(error) }
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
    use crate::domain::JobId;

    #[tokio::test]
    async fn images_leave_the_answer_and_come_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        let token = Token { id: JobId::new(1, 2, 3), attempt: 1 };
        let png = BASE64.encode([0x89, b'P', b'N', b'G', 1, 2, 3]);
        let body = serde_json::json!({"created": 1, "data": [{"b64_json": png}, {"b64_json": png}]}).to_string();
        let answer = Answer {
            status: 200,
            content_type: "application/json".into(),
            body: Bytes::from(body.clone()),
            usage: None,
        };
        let stored = artifacts.keep(token, JobKind::Image, &answer).await.unwrap();
        assert_eq!(stored.artifacts.len(), 2);
        assert_eq!(stored.artifacts[1].artifact.name, "image-1.png");
        let files: Vec<_> = stored.artifacts.iter().map(|s| (s.artifact.clone(), s.path.clone())).collect();
        let kept = stored.body.unwrap();
        assert!(!kept.windows(png.len()).any(|w| w == png.as_bytes()), "images are not kept twice");
        assert_eq!(artifacts.inline(kept, &files).await.unwrap(), body);
        assert_eq!(artifacts.read(&stored.artifacts[0].path, Some((1, 4))).await.unwrap(), Bytes::from_static(b"PNG"));
    }

    #[tokio::test]
    async fn audio_is_one_file_and_no_body() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        let token = Token { id: JobId::new(1, 2, 3), attempt: 1 };
        let answer =
            Answer { status: 200, content_type: "audio/wav".into(), body: Bytes::from_static(b"RIFF"), usage: None };
        let stored = artifacts.keep(token, JobKind::Audio, &answer).await.unwrap();
        assert_eq!((stored.body, stored.artifacts[0].artifact.name.as_str()), (None, "audio-0.wav"));
    }
}
