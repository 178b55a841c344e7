//! The names of blocks.

use block_pool::{PrefixKey, Salt, SaltFrom};
use sha2::{Digest, Sha256};

/// The name of a block: a hash of all that a search for it compares. So it is the same in all engines and at all times,
/// for routers that keep one index of several engines by the names of blocks. (vLLM's names have this property, too;
/// they differ from these.)
pub(crate) fn name(parent: Option<u64>, tokens: &[u32], key: &PrefixKey, salts: &[SaltFrom]) -> u64 {
    // Each part says what it is or how long it is, so that no two blocks have the same bytes.
    let mut hash = Sha256::new();
    number(&mut hash, parent.is_some().into());
    number(&mut hash, parent.unwrap_or(0));
    number(&mut hash, tokens.len() as u64);
    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    salt(&mut hash, &key.salt);
    number(&mut hash, key.window.is_some().into());
    if let Some(window) = key.window {
        number(&mut hash, window.tokens() as u64);
        number(&mut hash, window.sink_tokens() as u64);
    }
    for from in salts {
        number(&mut hash, from.position as u64);
        salt(&mut hash, &from.salt);
    }
    hash.finalize().first_chunk().map_or(0, |start| u64::from_le_bytes(*start))
}

fn number(hash: &mut Sha256, number: u64) {
    hash.update(number.to_le_bytes());
}

fn salt(hash: &mut Sha256, salt: &Salt) {
    number(hash, salt.bytes().is_some().into());
    let bytes = salt.bytes().unwrap_or_default();
    number(hash, bytes.len() as u64);
    hash.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use block_pool::Window;

    #[test]
    fn names_differ_in_everything_that_is_compared() {
        let plain = PrefixKey::new();
        let salted = |salt: &[u8]| PrefixKey::new().salt(Salt::new(salt));
        let from = |position, salt: &[u8]| SaltFrom { position, salt: Salt::new(salt) };
        let mut names = vec![
            name(None, &[1, 2], &plain, &[]),
            name(None, &[1, 3], &plain, &[]),
            name(None, &[1], &plain, &[]),
            name(Some(0), &[1, 2], &plain, &[]),
            name(Some(1), &[1, 2], &plain, &[]),
            name(None, &[1, 2], &salted(b""), &[]),
            name(None, &[1, 2], &salted(b"a"), &[]),
            name(None, &[1, 2], &plain.clone().window(Window::new(4)), &[]),
            name(None, &[1, 2], &plain.clone().window(Window::new(4).with_sink_tokens(1)), &[]),
            name(None, &[1, 2], &plain, &[from(0, b"a")]),
            name(None, &[1, 2], &plain, &[from(1, b"a")]),
            name(None, &[1, 2], &plain, &[from(0, b"a"), from(0, b"b")]),
        ];
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    /// Engines of several versions may serve one model, so a name must not change. The expected value is from Python's
    /// `hashlib`: the numbers 0, 0, 2 in 8 bytes each, the tokens 1 and 2 in 4 bytes each, and the numbers 0, 0, 0.
    #[test]
    fn names_stay_the_same() {
        assert_eq!(name(None, &[1, 2], &PrefixKey::new(), &[]), 0x1343_f6cb_ac35_1189);
    }
}
