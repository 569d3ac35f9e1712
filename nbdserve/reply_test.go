package nbdserve

import (
	"encoding/binary"
	"fmt"
	"io"
)

// readReply reads one reply by the letter of the protocol. reads has the lengths
// of the reads under way: a simple reply does not tell.
func readReply(r io.Reader, d dialect, reads map[uint64]int) (reply, error) {
	if d == simple {
		return readSimple(r, reads)
	}
	var all reply
	for first := true; ; first = false {
		cookie, done, err := readChunk(r, d, reads, &all)
		if err != nil {
			return all, err
		}
		if !first && cookie != all.cookie {
			return all, fmt.Errorf("chunk of %d among those of %d", cookie, all.cookie)
		}
		all.cookie = cookie
		if done {
			delete(reads, cookie)
			return all, nil
		}
	}
}

func readSimple(r io.Reader, reads map[uint64]int) (reply, error) {
	var h struct {
		Magic, Error uint32
		Cookie       uint64
	}
	if err := binary.Read(r, binary.BigEndian, &h); err != nil {
		return reply{}, err
	}
	if h.Magic != 0x67446698 {
		return reply{}, fmt.Errorf("magic %#x", h.Magic)
	}
	all := reply{cookie: h.Cookie, code: h.Error}
	if n, ok := reads[h.Cookie]; ok && h.Error == 0 {
		all.data = make([]byte, n)
		if _, err := io.ReadFull(r, all.data); err != nil {
			return all, fmt.Errorf("data of %d: %w", h.Cookie, err)
		}
	}
	delete(reads, h.Cookie)
	return all, nil
}

func readChunk(r io.Reader, d dialect, reads map[uint64]int, all *reply) (cookie uint64, done bool, err error) {
	var h struct {
		Magic       uint32
		Flags, Type uint16
		Cookie      uint64
	}
	if err := binary.Read(r, binary.BigEndian, &h); err != nil {
		return 0, false, err
	}
	var length uint64
	if d == extended {
		var more struct{ Offset, Length uint64 }
		err = binary.Read(r, binary.BigEndian, &more)
		length = more.Length
	} else {
		var more uint32
		err = binary.Read(r, binary.BigEndian, &more)
		length = uint64(more)
	}
	if want := [...]uint32{0, 0x668e33ef, 0x6e8a278c}[d]; err != nil || h.Magic != want || length > 64<<20 {
		return 0, false, fmt.Errorf("chunk %+v of %d bytes: %w", h, length, err)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, false, fmt.Errorf("payload of %d: %w", h.Cookie, err)
	}
	return h.Cookie, h.Flags&1 != 0, all.add(h.Type, payload, reads[h.Cookie])
}

func (all *reply) add(kind uint16, p []byte, read int) error {
	short := fmt.Errorf("chunk of type %d with %d bytes", kind, len(p))
	switch kind {
	case 0:
		if len(p) != 0 {
			return short
		}
	case 1:
		if len(p) != 8+read {
			return fmt.Errorf("%w for a read of %d", short, read)
		}
		all.data = p[8:]
	case 5, 6:
		return all.addStatus(kind, p)
	case 0x8001:
		if len(p) < 6 || len(p) != 6+int(binary.BigEndian.Uint16(p[4:])) {
			return short
		}
		all.code, all.text = binary.BigEndian.Uint32(p), string(p[6:])
	default:
		return short
	}
	return nil
}

func (all *reply) addStatus(kind uint16, p []byte) error {
	if all.status == nil {
		all.status = make(map[uint32][]extent)
	}
	head, size := 4, 8
	if kind == 6 {
		head, size = 8, 16
	}
	if len(p) < head+size || (len(p)-head)%size != 0 {
		return fmt.Errorf("status of %d bytes", len(p))
	}
	id := binary.BigEndian.Uint32(p)
	for b := p[head:]; len(b) > 0; b = b[size:] {
		e := extent{uint64(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint32(b[4:])}
		if kind == 6 {
			e = extent{binary.BigEndian.Uint64(b), uint32(binary.BigEndian.Uint64(b[8:]))}
		}
		all.status[id] = append(all.status[id], e)
	}
	if kind == 6 && int(binary.BigEndian.Uint32(p[4:])) != len(all.status[id]) {
		return fmt.Errorf("status says %d extents and has %d", binary.BigEndian.Uint32(p[4:]), len(all.status[id]))
	}
	return nil
}
