//! A password, or a URL that holds one: given directly, or in a file that is read again at every connection, so that
//! a rotated secret is picked up without a restart.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};

use crate::redact;

/// See the module. `Debug` never shows it.
#[derive(Clone)]
pub enum Secret {
    /// From a variable or an argument.
    Inline(SecretString),
    /// From a file: `*_FILE` or a systemd credential.
    File(PathBuf),
}

impl Secret {
    /// A secret given directly.
    pub fn inline(secret: impl Into<String>) -> Self {
        Self::Inline(SecretString::from(secret.into()))
    }

    /// The secret as it is now, without the newline that ends most files.
    ///
    /// # Errors
    /// The file cannot be read; the error names it.
    pub fn read(&self) -> io::Result<String> {
        match self {
            Self::Inline(secret) => Ok(secret.expose_secret().to_owned()),
            Self::File(path) => std::fs::read_to_string(path)
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| io::Error::new(error.kind(), format!("cannot read {}: {error}", shown_path(path)))),
        }
    }
}

/// The path; what may be the secret itself, set where its file was to be named, is hidden.
fn shown_path(path: &Path) -> String {
    redact::setting(&path.display().to_string()).into_owned()
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("[hidden]"),
            Self::File(path) => write!(f, "[hidden, from {}]", shown_path(path)),
        }
    }
}
