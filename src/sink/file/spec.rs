//! The configuration of a file.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use url::Url;

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
        let path = match url.address.starts_with('/') {
            true => Url::parse(&format!("file://{}", url.address)).ok().and_then(|url| url.to_file_path().ok()),
            false => None,
        };
        let path = path.and_then(|path| path.into_os_string().into_string().ok());
        let path = path.ok_or("it is written file:///path/of/the/file, with %20 for a space and %25 for a %")?;
        Ok(vec![("path".to_owned(), path)])
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

    fn exclusive(&self) -> Option<String> {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        Some(format!("the file {}", path.display()))
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

#[cfg(test)]
mod tests {
    use crate::sink::spec::of_url;

    #[test]
    fn a_url_names_its_path_as_urls_do() {
        let path = |url: &str| {
            let (kind, parts) = of_url(url).expect("the kind is known");
            kind.fields(parts).map(|fields| fields[0].1.clone())
        };
        assert_eq!(path("file:///var/my%20events.jsonl?fsync=false").as_deref(), Ok("/var/my events.jsonl"));
        assert_eq!(path("file:///var/100%25").as_deref(), Ok("/var/100%"));
        assert!(path("file://events.jsonl").is_err(), "a host is no folder");
    }
}
