//! Certificates, made on the spot.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::folder::write_private;

/// An authority that nobody knows but those who are told of its file.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate's PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// Of the authority that issued it.
    pub authority: PathBuf,
    /// The certificate itself.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Authority {
    /// Writes its certificate to `folder`.
    pub fn new(folder: &Path) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "devstack");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        fs::write(folder.join("authority.pem"), params.self_signed(&key)?.pem())?;
        Ok(Self { folder: folder.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// Issues a certificate for `name`: of a server, the host under which others know it.
    pub fn issue(&self, name: &str) -> anyhow::Result<Certificate> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([name.to_owned()])?;
        // Without a name of its own it would look as if it had signed itself.
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let file = |suffix: &str| self.folder.join(format!("{name}.{suffix}"));
        fs::write(file("pem"), certificate.pem())?;
        write_private(&file("key"), &key.serialize_pem())?;
        Ok(Certificate {
            authority: self.folder.join("authority.pem"),
            certificate: file("pem"),
            key: file("key"),
        })
    }
}
