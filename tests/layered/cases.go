package layered

import (
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
)

// Cases are stacks by what they are about.
func Cases() map[string]Stack {
	root := Dir(".", 0o755)
	deep := strings.Repeat("d/", 40) + "d"
	var way []Entry
	for i := range strings.Count(deep, "/") + 1 {
		way = append(way, Dir(deep[:2*i+1], 0o755))
	}
	twice := []Entry{root, Dir("d", 0o755), File("d/a", "1"), File("b", "1")}
	big := strings.Repeat("0123456789abcdef", 20_000)
	return map[string]Stack{
		"one": {{root, File("f", "one")}},
		"files": {
			{root, File("kept", "low"), File("replaced", "low"), Dir("d", 0o700), File("d/low", "1")},
			{root, File("replaced", "high, and longer"), Dir("d", 0o755).Owned(7, 8), File("d/high", "2"), Symlink("link", "d/low")},
		},
		"deleted": {
			{root, File("f", "1"), Dir("d", 0o755), File("d/a", "a"), File("d/b", "b"), Dir("gone", 0o755), File("gone/x", "x")},
			{root, Removed("f"), Dir("d", 0o755), Removed("d/a"), Removed("gone")},
		},
		"deleted and back": {
			{root, Dir("d", 0o755), File("d/low", "1"), File("f", "1")},
			{root, Removed("d"), Removed("f")},
			{root, Dir("d", 0o700), File("d/high", "2"), File("f", "three")},
		},
		"directory by file and back": {
			{root, Dir("x", 0o755), File("x/low", "1"), File("y", "file")},
			{root, File("x", "file"), Dir("y", 0o755), File("y/in", "2")},
			{root, Dir("x", 0o750), File("x/high", "3"), Symlink("y", "x")},
		},
		"opaque": {
			{root, Dir("d", 0o755), File("d/low", "1"), Dir("d/sub", 0o755), File("d/sub/low", "1")},
			{root, Dir("d", 0o755), Emptied("d"), File("d/mid", "2"), Dir("d/sub", 0o711), File("d/sub/mid", "2")},
			{root, Dir("d", 0o755), File("d/high", "3"), Dir("d/sub", 0o755), File("d/sub/high", "3")},
		},
		"opaque root": {
			{root, File("low", "1"), Dir("d", 0o755), File("d/low", "1")},
			{root, Emptied("."), File("mid", "2"), Dir("d", 0o755), File("d/mid", "2")},
			{root, File("high", "3"), Dir("d", 0o700), Removed("mid")},
		},
		"opaque root alone": {
			{root, File("low", "1")},
			{root, Emptied("."), File("high", "2"), Removed("low")},
		},
		"one layer twice": {twice, {root, Removed("d"), File("b", "22"), File("c", "3")}, twice},
		"nothing there": {
			{root, File("f", "1"), File("kept", "1")},
			{root, Removed("nothing"), Removed("f")},
			{root, Removed("nothing"), Removed("f"), Removed("more")},
		},
		"hard links": {
			{root, File("a", "linked"), Hardlink("b", "a"), Dir("d", 0o755), Hardlink("d/c", "a")},
			{root, File("x", "other"), Hardlink("y", "x"), Dir("d", 0o755)},
		},
		"deep": {
			append(append([]Entry{root}, way...), File(deep+"/low", "1"), File("d/d/f", "1")),
			append(append([]Entry{root}, way...), File(deep+"/high", "2"), Removed("d/d/f")),
			{root, Dir("d", 0o711), Dir("d/d", 0o711), File("d/d/top", "3")},
		},
		"attributes": {
			{root, File("f", "1").With("user.low", "1"), Dir("d", 0o755).With("user.low", "1").With("security.x", "y")},
			{root.With("user.root", "r"), Dir("d", 0o2755).With("user.high", "2"), Emptied("d"),
				File("f", "2").With("trusted.mine", "kept"), Char("null", 1, 3)},
		},
		"names": {
			{root, File("!low", "1"), File("-", "1"), File("..x", "1"), File(".x", "1"), File("\xff", "1"), File("a", "1")},
			{root, File("!", "2"), File("...", "2"), File(".x", "22"), File("\x01", "2"), File("a\x80", "2"), File("a", "22")},
		},
		"large": {
			{root, File("big", big), File("kept", big[1:])},
			{root, File("big", big[:70_000])},
		},
		"wide": {wide("low", 250), wide("high", 350), {root, Dir("w", 0o755), Removed("w/low-198"), Removed("w/both-198")}},
		"130":  Many(130),
	}
}

// wide has a directory of several blocks, some of whose names every caller has.
func wide(name string, n int) []Entry {
	entries := []Entry{Dir(".", 0o755), Dir("w", 0o755)}
	for i := range n {
		entries = append(entries, File(fmt.Sprintf("w/%s-%03d", name, i), name))
		if i%3 == 0 {
			entries = append(entries, File(fmt.Sprintf("w/both-%03d", i), name), Dir(fmt.Sprintf("w/dir-%03d", i), 0o755), File(fmt.Sprintf("w/dir-%03d/%s", i, name), ""))
		}
	}
	return entries
}

// names are few, so that layers meet, and some sort before "." and "..".
var names = []string{"a", "b", "ab", "!", "..a", ".a", "z\xfe", "long-" + strings.Repeat("n", 200)}

// Random is a stack of layers that change what is below them in every way there is.
func Random(seed uint64, layers int) Stack {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 1)), dirs: map[string]bool{".": true}}
	var s Stack
	for range layers {
		s = append(s, g.layer())
	}
	return s
}

type generator struct {
	*rand.Rand
	dirs map[string]bool // that there may be, in the layers so far
	made map[string]bool // directories of this layer
	used map[string]bool // other paths of this layer
	out  []Entry
}

func (g *generator) layer() []Entry {
	g.out, g.made, g.used = nil, map[string]bool{}, map[string]bool{}
	g.dir(".")
	for range 2 + g.IntN(12) {
		g.change()
	}
	return g.out
}

// dir has the layer hold a directory, and those above it.
func (g *generator) dir(name string) bool {
	if g.made[name] {
		return true
	}
	if g.used[name] || name != "." && !g.dir(path.Dir(name)) {
		return false
	}
	g.made[name], g.dirs[name] = true, true
	g.out = append(g.out, Dir(name, int64(0o700+g.IntN(0o100))).Owned(g.IntN(3), 0))
	return true
}

func (g *generator) change() {
	all := make([]string, 0, len(g.dirs))
	for d := range g.dirs {
		all = append(all, d)
	}
	slices.Sort(all)
	parent := all[g.IntN(len(all))]
	name := path.Join(parent, names[g.IntN(len(names))])
	if g.made[name] || g.used[name] || !g.dir(parent) {
		return
	}
	switch kind := g.IntN(10); kind {
	case 0, 1, 2:
		if strings.Count(name, "/") < 5 {
			g.dir(name)
		}
	case 3:
		if parent != "." || g.IntN(8) == 0 {
			g.out = append(g.out, Emptied(parent))
		}
	case 4, 5:
		g.used[name] = true
		g.out = append(g.out, Removed(name))
	case 6:
		g.used[name] = true
		g.out = append(g.out, Symlink(name, "a/b"))
	case 7:
		g.used[name] = true
		g.out = append(g.out, Char(name, 1, 1+g.Int64N(3)))
	default:
		g.used[name] = true
		g.out = append(g.out, File(name, strings.Repeat(name, g.IntN(60))).With("user.n", name))
	}
}
