//! The configuration of a file.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;

use crate::sink::file::{FileConfig, FileSink};
use crate::sink::spec::{self, Configured, Field, Invalid, Opening, UrlParts};
use crate::sink::{Format, Sink};
use crate::units::{self, Quantity};

/// The fields of a destination with `type = "file"`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    path: PathBuf,
    #[serde(default = "format")]
    format: Format,
    max_size: Option<Quantity>,
    #[serde(default)]
    daily: bool,
    #[serde(default = "fsync")]
    fsync: bool,
}

fn format() -> Format {
    Format::CloudEvents
}

fn fsync() -> bool {
    true
}

impl Spec {
    /// Returns the size in bytes from which a file is set aside.
    fn max_size(&self) -> Result<Option<u64>, Invalid> {
        let size = self.max_size.as_ref().map(|Quantity(text)| units::bytes(text, 1..=1 << 60)).transpose();
        size.map_err(|reason| Invalid { field: "max_size", reason })
    }
}

impl Configured for Spec {
    const TYPE: &'static str = "file";
    const SCHEMES: &'static [&'static str] = &["file"];
    const LOG_TARGETS: &'static [(&'static str, LevelFilter)] = &[];

    fn address(url: &mut UrlParts<'_>) -> Result<Vec<Field>, String> {
        if !url.address.starts_with('/') {
            return Err("it is written file:///path/of/the/file".to_owned());
        }
        Ok(vec![("path".to_owned(), url.address.to_owned())])
    }
}

#[async_trait]
impl spec::Spec for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        if self.path.file_name().is_none() {
            return Err(Invalid { field: "path", reason: "it names no file".to_owned() });
        }
        self.max_size().map(drop)
    }

    async fn open(&self, with: &Opening) -> Result<Arc<dyn Sink>, Invalid> {
        Ok(Arc::new(FileSink::new(FileConfig {
            path: self.path.clone(),
            source: with.source.clone(),
            format: self.format,
            max_size: self.max_size()?,
            daily: self.daily,
            fsync: self.fsync,
        })))
    }
}
