// Evaluates PromQL on scraped metrics, as Prometheus would: the dashboards' queries are tried with it.
//
// Standard input: {"scrapes": [{"time": unix seconds, "labels": {...}, "text": "..."}, ...], "queries": ["...", ...]}, scrapes in the order of
// their times. Standard output: {"query": [{"labels": {...}, "value": 1.5}, ...], ...}, each query at the last scrape's time.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/tsdb"
)

type scrape struct {
	Time   float64           `json:"time"`
	Labels map[string]string `json:"labels"`
	Text   string            `json:"text"`
}

type sample struct {
	Labels map[string]string `json:"labels"`
	Value  string            `json:"value"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var input struct {
		Scrapes []scrape `json:"scrapes"`
		Queries []string `json:"queries"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		return err
	}
	directory, err := os.MkdirTemp("", "promql")
	if err != nil {
		return err
	}
	defer os.RemoveAll(directory)
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	db, err := tsdb.Open(directory, quiet, nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		return err
	}
	defer db.Close()
	var last time.Time
	for _, s := range input.Scrapes {
		last = time.UnixMilli(int64(s.Time * 1000))
		if err := add(db, s, last.UnixMilli()); err != nil {
			return fmt.Errorf("scrape of %v: %w", s.Labels, err)
		}
	}
	engine := promql.NewEngine(promql.EngineOpts{Logger: quiet, MaxSamples: 1 << 24, Timeout: time.Minute, LookbackDelta: 5 * time.Minute})
	answers := map[string][]sample{}
	for _, text := range input.Queries {
		query, err := engine.NewInstantQuery(context.Background(), db, nil, text, last)
		if err != nil {
			return fmt.Errorf("%s: %w", text, err)
		}
		result := query.Exec(context.Background())
		vector, err := result.Vector()
		if err != nil {
			return fmt.Errorf("%s: %w", text, errors.Join(result.Err, err))
		}
		answers[text] = []sample{}
		for _, s := range vector {
			answers[text] = append(answers[text], sample{s.Metric.Map(), fmt.Sprint(s.F)})
		}
		query.Close()
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

// add stores one scrape. A target's own labels win over those that its text has, as with honorLabels: false.
func add(db *tsdb.DB, s scrape, milliseconds int64) error {
	appender := db.Appender(context.Background())
	parser := textparse.NewPromParser([]byte(s.Text), labels.NewSymbolTable(), false)
	for {
		entry, err := parser.Next()
		if errors.Is(err, io.EOF) {
			return appender.Commit()
		}
		if err != nil {
			return err
		}
		if entry != textparse.EntrySeries {
			continue
		}
		_, _, value := parser.Series()
		var series labels.Labels
		parser.Labels(&series)
		builder := labels.NewBuilder(series)
		for name, value := range s.Labels {
			if had := series.Get(name); had != "" {
				builder.Set("exported_"+name, had)
			}
			builder.Set(name, value)
		}
		if _, err := appender.Append(0, builder.Labels(), milliseconds, value); err != nil {
			return err
		}
	}
}
