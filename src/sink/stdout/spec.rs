//! The configuration of standard output, which has no fields.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;

use crate::sink::Sink;
use crate::sink::spec::{self, Configured, Field, Invalid, Opening, UrlParts};
use crate::sink::stdout::{StdoutSink, closed};

/// A destination with `type = "stdout"`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {}

impl Configured for Spec {
    const TYPE: &'static str = "stdout";
    const SCHEMES: &'static [&'static str] = &["stdout"];
    const LOG_TARGETS: &'static [(&'static str, LevelFilter)] = &[];

    fn address(url: &mut UrlParts<'_>) -> Result<Vec<Field>, String> {
        if url.address.is_empty() {
            Ok(Vec::new())
        } else {
            Err("it is written stdout://, and nothing more".to_owned())
        }
    }
}

#[async_trait]
impl spec::Spec for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }

    fn obstacle(&self) -> Option<&'static str> {
        closed()
    }

    async fn open(&self, with: &Opening) -> Result<Arc<dyn Sink>, Invalid> {
        Ok(Arc::new(StdoutSink::new(with.source.clone())))
    }
}
