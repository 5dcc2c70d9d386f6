// A NIfTI of int16, as the server makes them, slice by slice: a graphics card is given one slice at a time, so that
// large studies need no more of it than small ones.

async function unpacked(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** `size` in columns, rows and slices; `slice(z)` its values as they are stored; `plane()` a NIfTI of one empty slice. */
export async function stackOf(packed) {
  const buffer = await unpacked(packed);
  const header = new DataView(buffer);
  const size = [42, 44, 46].map((place) => header.getInt16(place, true)); // dim[1] to dim[3]
  const start = header.getFloat32(108, true); // vox_offset
  const count = size[0] * size[1];
  const values = new Int16Array(buffer, start, count * size[2]);
  return {
    size,
    slice: (z) => values.subarray(z * count, (z + 1) * count),
    plane() {
      const one = new Uint8Array(start + 2 * count);
      one.set(new Uint8Array(buffer, 0, start));
      new DataView(one.buffer).setInt16(46, 1, true);
      return one.buffer;
    },
  };
}
