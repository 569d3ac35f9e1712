package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A work is what is done to a mount. The warm ones follow their cold one on the
// same mount.
type work struct {
	name  string
	image string // of the tree, or of the big file
	do    func(dir string) error
	warm  bool // is done again
}

func (b *bench) speedWorks() []work {
	return []work{
		{"find", "tree", find, true},
		{"read", "tree", readAll, true},
		{"big", "big", func(dir string) error { return shell(`cat "$1" > /dev/null`, filepath.Join(dir, bigName)) }, false},
		{"random", "big", randomReads, false},
	}
}

func workNames() []string {
	return []string{"find", "read", "big", "random", "many", "million", "network"}
}

// speed compares the peers on images of one kind.
func (b *bench) speed(kind string) error {
	peers := b.peers()
	var rows []string
	for _, w := range b.speedWorks() {
		if !b.wants(w.name) {
			continue
		}
		tree := b.tree
		if w.image == "big" {
			var err error
			if tree, err = b.bigTree(); err != nil {
				return err
			}
		}
		path, err := b.image(w.image, tree, kind)
		if err != nil {
			return err
		}
		if err := b.compare(peers, path, w); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		rows = append(rows, w.name+", cold")
		if w.warm {
			rows = append(rows, w.name+", warm")
		}
	}
	if len(rows) > 0 {
		printTable(imageKinds()[kind].name, peers, rows)
	}
	return nil
}

// compare does a work to an image mounted by each peer, the rounds interleaved.
func (b *bench) compare(peers []*peer, image string, w work) error {
	dir, err := os.MkdirTemp(b.dir, "mnt-")
	if err != nil {
		return err
	}
	for range b.rounds {
		for _, p := range peers {
			if err := p.round(image, dir, w); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	return os.Remove(dir)
}

func (p *peer) round(image, dir string, w work) (err error) {
	m, err := p.mount(image, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	c, err := m.measure(true, w.do)
	if err != nil {
		return err
	}
	p.keep(w.name+", cold", c)
	if !w.warm {
		return nil
	}
	if c, err = m.measure(false, w.do); err != nil {
		return err
	}
	p.keep(w.name+", warm", c)
	return nil
}

// randomReads has four threads of fio read 4 KiB each time, at places that are the
// same in each round.
func randomReads(dir string) error {
	cmd := exec.Command("fio", "--name=random", "--filename="+filepath.Join(dir, bigName), "--readonly", "--rw=randread", "--bs=4k",
		"--ioengine=psync", "--thread", "--numjobs=4", "--number_ios=8000", "--randseed=1", "--allrandrepeat=1",
		"--group_reporting", "--output-format=json")
	said, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("fio: %w: %s", err, said)
	}
	var report struct {
		Jobs []struct {
			Error int
			Read  struct {
				TotalIOs int `json:"total_ios"`
			}
		}
	}
	if err := json.Unmarshal(said, &report); err != nil {
		return fmt.Errorf("fio: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 || report.Jobs[0].Read.TotalIOs != 4*8000 {
		return fmt.Errorf("fio did something else: %s", said)
	}
	return nil
}

// printTable prints a row for each work: seconds, ratios, and the seconds of
// processor time of the servers.
func printTable(title string, peers []*peer, rows []string) {
	fmt.Printf("| %s |", title)
	for _, p := range peers {
		fmt.Printf(" %s |", p.name)
	}
	for _, p := range peers[1:] {
		fmt.Printf(" / %s |", p.name)
	}
	for _, p := range peers {
		if p.server != nil {
			fmt.Printf(" %s CPU |", p.name)
		}
	}
	columns := 0
	for _, p := range peers {
		columns += 2
		if p.server != nil {
			columns++
		}
	}
	fmt.Printf("\n|---|%s\n", strings.Repeat("---|", columns-1))
	for _, row := range rows {
		fmt.Printf("| %s |", row)
		for _, p := range peers {
			fmt.Printf(" %.3f |", p.best[row].wall.Seconds())
		}
		for _, p := range peers[1:] {
			fmt.Printf(" %.2f |", peers[0].best[row].wall.Seconds()/p.best[row].wall.Seconds())
		}
		for _, p := range peers {
			if p.server != nil {
				fmt.Printf(" %.2f |", p.best[row].cpu.Seconds())
			}
		}
		fmt.Println()
	}
	fmt.Printf("\nLoad %s; best of the rounds; seconds.\n\n", loadAverage())
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// many compares the listing of more files than any cache of ours would hold.
func (b *bench) many() error {
	path, err := b.manyImage(250_000)
	if err != nil {
		return err
	}
	peers := b.peers()
	if err := b.compare(peers, path, work{"find", "many", find, true}); err != nil {
		return err
	}
	printTable("250,000 files", peers, []string{"find, cold", "find, warm"})
	return nil
}

// million prints how much memory a server takes that is walked and read wholly.
func (b *bench) million() (err error) {
	path, err := b.manyImage(1_000_000)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "mnt-")
	if err != nil {
		return err
	}
	fmt.Print("| a million files | largest resident set | listing | reading |\n|---|---|---|---|\n")
	for _, p := range b.peers() {
		if p.server == nil {
			continue
		}
		if err := p.walkWholly(path, dir); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	fmt.Println()
	return os.Remove(dir)
}

func (p *peer) walkWholly(image, dir string) (err error) {
	m, err := p.mount(image, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	listing, err := m.measure(true, find)
	if err != nil {
		return err
	}
	reading, err := m.measure(true, readAll)
	if err != nil {
		return err
	}
	memory, err := m.memory()
	if err != nil {
		return err
	}
	fmt.Printf("| %s | %s | %s | %s |\n", p.name, memory, listing.wall.Round(10*time.Millisecond), reading.wall.Round(10*time.Millisecond))
	return nil
}
