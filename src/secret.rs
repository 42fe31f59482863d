//! Passwords and URLs that hold a password. A secret is given directly or in a file. The file is read again at every
//! connection, so that a rotated secret is used without a restart.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};

use crate::redact;

/// A password, or a URL that holds one. `Debug` never shows it.
#[derive(Clone)]
pub enum Secret {
    /// From a variable or an argument.
    Inline(SecretString),
    /// From a file: `*_FILE` or a systemd credential.
    File(PathBuf),
}

impl Secret {
    /// Returns a secret that is given directly.
    pub fn inline(secret: impl Into<String>) -> Self {
        Self::Inline(SecretString::from(secret.into()))
    }

    /// Returns the secret as it is now. Newlines at the end of a file are removed.
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

/// Returns the path for an error. If it may be the secret itself, set by mistake instead of the file's name, it is hidden.
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
