//! The hash of names in indexed directories: half MD4, names as unsigned bytes ("Hash Tree Directories"; fs/ext4/hash.c).

/// Hash and minor hash of a name.
pub(super) fn half_md4(name: &[u8], seed: [u32; 4]) -> (u32, u32) {
    let mut state = seed;
    if state == [0; 4] {
        state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    }
    let mut rest = name;
    while !rest.is_empty() {
        transform(&mut state, &words(rest));
        rest = &rest[rest.len().min(32)..];
    }
    // The lowest bit marks a block that goes on with its predecessor's hash, the highest value marks the end.
    let hash = state[1] & !1;
    (if hash == 0xffff_fffe { 0xffff_fffc } else { hash }, state[2])
}

/// The next 32 bytes, filled up with a pattern of the length of all that is left.
fn words(rest: &[u8]) -> [u32; 8] {
    let length = rest.len() as u32;
    let mut pad = length | length << 8;
    pad |= pad << 16;
    let mut words = [pad; 8];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        *word = bytes.iter().fold(pad, |word, &byte| u32::from(byte).wrapping_add(word << 8));
    }
    words
}

fn transform(state: &mut [u32; 4], input: &[u32; 8]) {
    const ROUNDS: [(u32, [usize; 8], [u32; 4]); 3] = [
        (0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (0x5a82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (0x6ed9_eba1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (round, (constant, order, shifts)) in ROUNDS.into_iter().enumerate() {
        for (step, index) in order.into_iter().enumerate() {
            let mixed = match round {
                0 => d ^ (b & (c ^ d)),
                1 => (b & c).wrapping_add((b ^ c) & d),
                _ => b ^ c ^ d,
            };
            let sum = a.wrapping_add(mixed).wrapping_add(input[index]).wrapping_add(constant);
            // The four take turns.
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What debugfs 1.47.0 answers to `dx_hash -h half_md4 -s 22222222-2222-8222-a222-222222222222`.
    #[test]
    fn names_hash_as_e2fsprogs_hashes_them() {
        let seed = [0x2222_2222, 0x2282_2222, 0x2222_22a2, 0x2222_2222];
        assert_eq!(half_md4(b"a", seed), (0x4098_6790, 0x96fa_65ec));
        assert_eq!(half_md4(b"hello", seed), (0xe44e_f150, 0x1ae3_790a));
        let long = b"a name of more than thirty-two bytes, so two rounds";
        assert_eq!(half_md4(long, seed), (0xf7f4_9792, 0xefff_0e9b));
    }
}
